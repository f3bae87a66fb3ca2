"""Writers that are killed at each file operation, in a process that has not loaded torch.

They fork a thousand times, and a fork takes as long as a process is large: the files `killed.py` are run as tests of a
process of their own. `pytest tests/bundle/killed.py` runs one of them as usual.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("killed.py"))


def test_the_files_are_found() -> None:
    assert [f"{area}/killed.py" for area in ("bundle", "graph/core", "runtime/bulk", "runtime/search")] == FILES


@pytest.mark.parametrize("file", FILES)
def test_killed_writers(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
