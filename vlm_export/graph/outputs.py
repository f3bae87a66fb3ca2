"""Files that a command writes: refused early where they stand in the way, and put in place in one step."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from vlm_export.bundle.environment import environment_errors
from vlm_export.errors import UsageError


def check_output(path: Path | str, *, overwrite: bool) -> None:
    """Refuses a target before any work is done for it; UsageError says why."""
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise UsageError("the output's directory does not exist", where=str(path.parent), fix="create it")
    if path.is_dir():
        raise UsageError("the output is a directory", where=str(path), fix="name a file")
    if os.path.lexists(path) and not overwrite:
        raise UsageError("the output exists", where=str(path), fix="choose another name, or pass --overwrite")


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes a text file beside its target, then renames it."""
    check_output(path, overwrite=overwrite)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with environment_errors("writing the file", path.parent, len(text)):
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
