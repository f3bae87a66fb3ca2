"""Faults of the machine while files are written: each becomes an EnvironmentFailure that names the stage."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_export.errors import EnvironmentFailure

_FIXES = {
    errno.ENOSPC: "free disk space, or choose another output directory",
    getattr(errno, "EDQUOT", -1): "free space in your quota, or choose another output directory",
    errno.EFBIG: "raise the file size limit (ulimit -f), or choose a file system that holds larger files",
    errno.EROFS: "choose an output directory on a writable file system",
    errno.EACCES: "choose a directory that you may write to, or change its permissions",
    errno.EPERM: "choose a directory that you may write to, or change its permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system is out of file handles",
    errno.ENOMEM: "free memory, or run on a machine with more",
    errno.ENOLCK: "choose an output directory on a file system that can lock files",
    errno.ENOTSUP: "choose an output directory on a file system that can lock files",
    errno.ENAMETOOLONG: "choose a shorter output path",
    errno.EIO: "check the disk: the system reports an input or output error",
    errno.EBUSY: "choose a directory that is no mount point and that nothing uses, such as one below it",
    errno.EXDEV: "choose a directory that lies wholly on one file system, in a container one below a volume",
}
_OTHER_FIX = "choose another output directory; the system refuses this operation there"
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
        raise EnvironmentFailure("out of memory", where=stage, fix=_FIXES[errno.ENOMEM]) from error
    except OSError as error:
        if error.errno in _NOT_THE_MACHINES:
            raise
        named = error.filename2 or error.filename
        raise EnvironmentFailure(
            f"cannot write: {error.strerror}",
            where=f"{stage}: {os.fsdecode(named)}" if isinstance(named, str | bytes) else stage,
            expected=f"{needed_bytes} bytes free" if needed_bytes else "",
            got=f"{free_bytes(path)} bytes free" if path is not None else "",
            fix=_FIXES.get(error.errno or 0, _OTHER_FIX),
        ) from error


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path` or of its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_free_space(path: Path, needed_bytes: int) -> None:
    """EnvironmentFailure when the file system of `path` has less than `needed_bytes` free."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise EnvironmentFailure(
            "not enough disk space",
            where=str(path),
            expected=f"{needed_bytes} bytes free",
            got=f"{free} bytes free",
            fix=_FIXES[errno.ENOSPC],
        )
