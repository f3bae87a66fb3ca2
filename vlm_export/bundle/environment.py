"""Faults of the machine while files are written: each becomes an EnvironmentFailure that names the stage."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_export.errors import EnvironmentFailure
from vlm_export.machine_faults import CAUSES

# What stands in the way of an output alone, beside what tells of the machine in any case (`machine_faults.CAUSES`).
_FIXES = {
    errno.ENAMETOOLONG: "choose a shorter output path",
    errno.EBUSY: "choose a directory that is no mount point and that nothing uses, such as one below it",
    errno.EXDEV: "choose a directory that lies wholly on one file system, in a container one below a volume",
    errno.ENOTSUP: "choose an output directory on a file system that can lock files",
    errno.EACCES: "choose a directory that you may write to, or change its permissions",
    errno.EPERM: "choose a directory that you may write to, or change its permissions",
}
_OTHER_FIX = "choose another output directory; the system refuses this operation there"
_NEEDS_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", -1))
# Libraries raise errors without a number; a file that is not there is the caller's to name; a closed pipe is no fault.
_NOT_THE_MACHINES = (None, errno.ENOENT, errno.EPIPE)


@contextmanager
def environment_errors(stage: str, path: Path | None = None, needed_bytes: int = 0) -> Iterator[None]:
    """Turns OSErrors that tell of the machine (disk full, read-only, limits) and MemoryError into EnvironmentFailure.

    Those are all that the system numbers, but for files that do not exist and closed pipes.

    Args:
        stage: what was being done, for the message.
        path: a directory on the file system in question; its free space is reported.
        needed_bytes: what the whole work needs there, 0 when unknown.
    """
    try:
        yield
    except MemoryError as error:
        what, fix = CAUSES[errno.ENOMEM]
        raise EnvironmentFailure(what, where=stage, fix=fix) from error
    except OSError as error:
        if error.errno in _NOT_THE_MACHINES:
            raise
        named = error.filename2 or error.filename
        # How much is free is no news where a limit or a permission stands in the way.
        is_full = error.errno in _NEEDS_ROOM
        raise EnvironmentFailure(
            f"cannot write: {error.strerror}",
            where=f"{stage}: {os.fsdecode(named)}" if isinstance(named, str | bytes) else stage,
            expected=f"{needed_bytes} bytes free" if needed_bytes and is_full else "",
            got=f"{free_bytes(path)} bytes free" if path is not None and is_full else "",
            fix=_fix(error.errno),
        ) from error


def _fix(number: int | None) -> str:
    if number in _FIXES:
        return _FIXES[number]
    return CAUSES[number][1] if number in CAUSES else _OTHER_FIX


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path` or of its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_free_space(path: Path, needed_bytes: int, fix: str = CAUSES[errno.ENOSPC][1]) -> None:
    """EnvironmentFailure when the file system of `path` has less than `needed_bytes` free."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise EnvironmentFailure(
            "not enough disk space",
            where=str(path),
            expected=f"{needed_bytes} bytes free",
            got=f"{free} bytes free",
            fix=fix,
        )
