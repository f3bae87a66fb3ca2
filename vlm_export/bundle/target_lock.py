"""One writer at a time per target: a lock file beside it, which the system releases when its owner dies.

`filelock` locks the open file. Its `FileLock` is not used: that leaves the file behind, names no process that holds it,
and takes any file that only has a lock's name for one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from vlm_export.errors import EnvironmentFailure

# Windows forbids others to read what is locked, which is byte 0.
_PID_OFFSET = 1
_MAX_LOCK_BYTES = 32
# A sweep on behalf of a neighbouring target holds the lock for a moment.
_RETRIES = 4
_RETRY_SECONDS = 0.05
# File systems take names of 255 bytes; what is put around a target's name needs 50.
_LONGEST_NAME_BYTES = 200


def short_name(target: Path) -> str:
    """The target's name as the names beside it carry it: whole, or its beginning and a digest where it is too long."""
    name = os.fsencode(target.name)
    if len(name) <= _LONGEST_NAME_BYTES:
        return target.name
    return f"{name[:80].decode(errors='ignore')}~{hashlib.sha256(name).hexdigest()[:32]}"


def lock_path(target: Path) -> Path:
    """The lock file of a target."""
    return target.parent / f".{short_name(target)}.vlm-export.lock"


@contextmanager
def locked(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the target's lock.

    Args:
        wait: until it is free, instead of failing.

    Raises:
        EnvironmentFailure: another process (or this one) already holds it, or something else has its name.
    """
    path, attempts = lock_path(target), 0
    while (descriptor := _acquire(path)) is None:
        attempts += 1
        if attempts > _RETRIES and not wait:
            raise EnvironmentFailure(
                "another process is writing this output",
                where=str(target),
                got=f"the lock {path.name} is held by process {_owner(path)}",
                fix="wait for it to end, or choose another output",
            )
        time.sleep(_RETRY_SECONDS)
    try:
        yield
    finally:
        _release(path, descriptor)


@contextmanager
def locked_if_free(target: Path) -> Iterator[bool]:
    """Holds the target's lock when nobody else does, and says whether it does; EnvironmentFailure as in `locked`."""
    path = lock_path(target)
    descriptor = _acquire(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _acquire(path: Path) -> int | None:
    """The locked descriptor, or None when another holds the lock.

    Raises:
        EnvironmentFailure: something that is no lock has the lock's name; it is left as it is.
    """
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    while True:
        _check_regular(path)
        descriptor = os.open(path, flags, 0o644)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                os.close(descriptor)
                return None
            if _is_same_file(path, descriptor):
                _check_owner(path, descriptor)
                _write_owner(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The last owner deleted the file between our open and our lock: that lock guards nothing.
        os.close(descriptor)


def _release(path: Path, descriptor: int) -> None:
    # Deleted while still held, so that nobody locks a file that is about to go; Windows refuses, and keeps the file.
    with suppress(OSError):
        if _is_same_file(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_regular(path: Path) -> None:
    """EnvironmentFailure when a link, directory, pipe or device has the name; opening those may do something."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _not_a_lock(path, "no regular file")


def _check_owner(path: Path, descriptor: int) -> None:
    """EnvironmentFailure unless the file holds a process id, as locks do, or nothing: the locker was just killed."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, _MAX_LOCK_BYTES + 1).strip(b"\0")
    if content and not (content.isdigit() and len(content) <= _MAX_LOCK_BYTES):
        raise _not_a_lock(path, "a file that no export wrote")


def _not_a_lock(path: Path, got: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        "what stands beside the output has the name of its lock",
        where=str(path),
        expected="nothing, or the lock of an export",
        got=got,
        fix="move it away, or choose another output",
    )


def _write_owner(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, _PID_OFFSET if sys.platform == "win32" else 0, os.SEEK_SET)
    os.write(descriptor, str(os.getpid()).encode())


def _owner(path: Path) -> str:
    with suppress(OSError):
        text = path.read_bytes()[:_MAX_LOCK_BYTES].strip(b"\0").decode("ascii", "replace")
        if text.isdigit():
            return text
    return "unknown"
