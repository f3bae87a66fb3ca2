"""Files that a command writes: refused early where they stand in the way, and put in place in one step."""

from __future__ import annotations

import os
from pathlib import Path

from vlm_export.bundle.staging import check_not_there, staged_file
from vlm_export.errors import UsageError


def check_output(path: Path | str, *, overwrite: bool) -> None:
    """Refuses a target before any work is done for it; UsageError says why."""
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise UsageError("the output's directory does not exist", where=str(path.parent), fix="create it")
    if path.is_dir():
        raise UsageError("the output is a directory", where=str(path), fix="name a file")
    check_not_there(path, overwrite=overwrite)


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes a text file beside its target, then renames it."""
    check_output(path, overwrite=overwrite)
    with staged_file(path, "writing the file", overwrite=overwrite, needed_bytes=len(text)) as staged:
        staged.write_text(text, encoding="utf-8")
