"""The programs of docs/search.md: what FAISS, LanceDB and Qdrant find in the shards of a folder is what `search` finds.

Each runs in an environment of its own, without this package.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vlm_export
from vlm_export.runtime.bulk.folder import embeddings_at
from vlm_export.runtime.bulk.items import TableColumns

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
PROGRAMS = {
    "import faiss": ("vectors-faiss", "faiss-cpu==1.15.1", "numpy", "pyarrow"),
    "import lancedb": ("vectors-lancedb", "lancedb==0.40.0", "pyarrow"),
    "qdrant_client": ("vectors-qdrant", "qdrant-client==1.20.0", "numpy", "pyarrow"),
}


@pytest.fixture(scope="module")
def shards(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images in three shards, with their colours."""
    folder = tmp_path_factory.mktemp("shards") / "images"
    columns = TableColumns(keep=("colour",))
    options = vlm_export.EmbedOptions(shard_items=4, shard_format="parquet", columns=columns)
    with pytest.MonkeyPatch.context() as patch:
        # Where the table's paths begin.
        patch.chdir(ROOT)
        vlm_export.embed(vlm_export.load(demo, threads=1), ["configs/demo/images.csv"], folder, options)
    return folder


@pytest.mark.parametrize("mark", PROGRAMS)
def test_they_find_what_search_finds(python_with: Callable[..., Path], shards: Path, tmp_path: Path, mark: str) -> None:
    (program,) = (code for code in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL) if mark in code)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [str(python_with(*PROGRAMS[mark])), "program.py", str(shards), str(tmp_path / "database")]
    done = subprocess.run(words, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split(" ", 1) for line in done.stdout.splitlines()]
    index = vlm_export.open_index(shards)
    vector = embeddings_at(shards).vectors[0]
    expected = index.search(vector, 3)
    assert [item for _, item in found] == [match.item for match in expected]
    np.testing.assert_allclose([float(score) for score, _ in found], [match.score for match in expected], atol=1e-4)
