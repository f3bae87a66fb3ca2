"""Disk space: asked before it is used, and one error when it runs out all the same."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from vlm_export.errors import EnvironmentFailure
from vlm_export.machine_faults import machine_fault


def check_free(path: Path, needed_bytes: int) -> None:
    """EnvironmentFailure when the disk of `path` (a file that may not exist yet) has too little space."""
    free_bytes = _free_bytes(path)
    if needed_bytes > free_bytes:
        raise _failure(path, needed_bytes, free_bytes, "")


def failure_from_write(path: Path, needed_bytes: int, error: OSError) -> EnvironmentFailure:
    """The error for a write that failed although it was asked before: a quota, a size limit, another writer."""
    if error.errno == errno.ENOSPC:
        return _failure(path, needed_bytes, _free_bytes(path), f"; {error}")
    return machine_fault(error, str(path)) or _failure(path, needed_bytes, _free_bytes(path), f"; {error}")


def _free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError as error:
        raise EnvironmentFailure("a directory to write to is missing", where=str(path), got=str(error)) from error


def _failure(path: Path, needed_bytes: int, free_bytes: int, detail: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        "a scratch file for weights cannot be written",
        where=str(path),
        expected=f"{needed_bytes} bytes more",
        got=f"{free_bytes} bytes free{detail}",
        fix="free some space, or choose a directory on a larger disk",
    )
