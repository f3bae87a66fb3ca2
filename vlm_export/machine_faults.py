"""Faults of the machine, told as such: an exception of the system or of a library → its cause and the way out.

Libraries turn what the system refuses into exceptions of their own, and code that reads untrusted files would take them
for damage of the file. Whatever turns an exception into an InputError asks here first.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import TypeAlias

from vlm_export.errors import EnvironmentFailure

Cause: TypeAlias = tuple[str, str]
"""What is wrong, and what the user can do."""

_MEMORY: Cause = (
    "out of memory",
    "free memory, raise the limit of address space (ulimit -v) if one is set, or use a machine with more",
)
_OPEN_FILES: Cause = ("too many open files for this process", "raise the limit of open files (ulimit -n)")
_FILE_SIZE: Cause = (
    "a file would be larger than allowed",
    "raise the file size limit (ulimit -f), or choose a file system that holds larger files",
)
_FULL: Cause = ("the disk is full", "free disk space, or choose another output directory")
_THREADS: Cause = (
    "the system starts no more threads",
    "raise the limits of processes and memory (ulimit -u, ulimit -v), or use fewer --threads",
)
_READ_ONLY: Cause = ("the file system is read-only", "choose an output directory on a writable file system")
_PERMISSION: Cause = (
    "permission denied",
    "change the permissions, or choose files and directories that you may use",
)
_NO_LOCKS: Cause = (
    "the file system cannot lock files",
    "choose an output directory on a file system that can lock files",
)

CAUSES: dict[int, Cause] = {
    errno.ENOSPC: _FULL,
    getattr(errno, "EDQUOT", -1): (
        "your quota of disk space is used up",
        "free space in your quota, or choose another output directory",
    ),
    errno.EFBIG: _FILE_SIZE,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: (
        "the system is out of file handles",
        "close other programs: the system is out of file handles",
    ),
    errno.ENOMEM: _MEMORY,
    errno.ENOLCK: _NO_LOCKS,
    errno.EIO: ("the system reports an input or output error", "check the disk"),
    getattr(errno, "ESTALE", -2): ("a network file system lost a file", "run the command again"),
}
"""What tells of the machine, whatever was being done, by the system's number."""

# What libraries say instead of raising MemoryError or OSError: ONNX Runtime and OpenVINO pass on C++ exceptions and
# their arena's refusals; torch has an allocator of its own; the dynamic loader's words come in ImportErrors; Python
# raises a RuntimeError where no thread starts.
_WORDS: tuple[tuple[re.Pattern[str], Cause], ...] = (
    (
        re.compile(
            r"std::bad_alloc|bad allocation|Cannot allocate memory|Failed to allocate memory|"
            r"not enough memory|Unable to allocate|failed to map segment|out of memory|OutOfMemory",
            re.IGNORECASE,
        ),
        _MEMORY,
    ),
    (re.compile(r"Too many open files", re.IGNORECASE), _OPEN_FILES),
    (re.compile(r"File too large", re.IGNORECASE), _FILE_SIZE),
    (re.compile(r"No space left on device", re.IGNORECASE), _FULL),
    (re.compile(r"can't start new thread|pthread_create|Resource temporarily unavailable"), _THREADS),
)
_LONGEST_CHAIN = 16
# What a message quotes is a name, or comes from a file: it tells of no machine.
_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`[^`]*`")


def machine_fault(error: BaseException, where: str = "") -> EnvironmentFailure | None:
    """What an exception, or one that it was raised from, tells of the machine; None where it tells of something else.

    Args:
        where: the file, or what was being done.
    """
    for link in _chain(error):
        found = _cause(link, where)
        if found is not None:
            what, fix = found
            return EnvironmentFailure(what, where=where or _named_file(link), got=_first_line(link), fix=fix)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and its causes; what it was raised in the midst of counts where it names no cause."""
    link: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _cause(error: BaseException, where: str) -> Cause | None:
    if isinstance(error, MemoryError):
        return _MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        return CAUSES.get(error.errno)
    if _has_fields(error):
        return None
    text = _QUOTED.sub("", str(error).replace(where, "") if where else str(error))
    return next((cause for words, cause in _WORDS if words.search(text)), None)


def _has_fields(error: BaseException) -> bool:
    """Whether it is an error of this project: its words may be those of an untrusted file."""
    return hasattr(error, "exit_status")


def _named_file(error: BaseException) -> str:
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return os.fsdecode(named) if isinstance(named, str | bytes) else ""


def _first_line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.strip().partition("\n")[0] or type(error).__name__
