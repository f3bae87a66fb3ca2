"""A file of a checkpoint, one and the same each time that it is opened: to be hashed, pinned, parsed and mapped."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vlm_export.errors import InputError, VlmExportError
from vlm_export.family import CheckpointFile
from vlm_export.machine_faults import machine_fault

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes done and the bytes in all."""
_CHUNK_BYTES = 4 << 20
# A pipe that took the file's place would block the opening; on regular files the flag does nothing.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class SeenFile:
    """A regular file as it was when it was first looked at; `str()` is its path.

    Attributes:
        identity: device, inode and time of the last change (ns).
    """

    path: Path
    size_bytes: int
    identity: tuple[int, int, int]

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        """Opens it for reading; InputError when it cannot be read or is not the file that was seen, EnvironmentFailure
        where the machine stands in the way."""
        try:
            file = os.fdopen(os.open(self.path, _FLAGS), "rb")
        except OSError as error:
            raise error_from_unreadable(self.path, error) from error
        try:
            self._check(os.fstat(file.fileno()))
        except InputError:
            file.close()
            raise
        return file

    def check_unchanged(self) -> None:
        """InputError when another file stands there now, or the same with other contents."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise error_from_unreadable(self.path, error) from error
        self._check(found)

    def _check(self, found: os.stat_result) -> None:
        if (found.st_size, _identity(found)) != (self.size_bytes, self.identity):
            raise InputError(
                "a file of the checkpoint changed while it was read",
                where=str(self.path),
                expected=f"the same {self.size_bytes} bytes as at the start",
                got="another file, or another time of its last change",
                fix="wait until nothing writes there any more, then start again",
            )


def see_file(path: Path) -> SeenFile:
    """The regular file at `path`, links followed; InputError when there is none."""
    try:
        found = path.stat()
    except OSError as error:
        raise error_from_unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError("a file of the checkpoint is no regular file", where=str(path), expected="a file")
    return SeenFile(path, found.st_size, _identity(found))


def hash_file(file: SeenFile, name: str, progress: Progress | None = None) -> CheckpointFile:
    """The file's size and sha256, listed under `name`; InputError when it cannot be read."""
    digest = hashlib.sha256()
    done = 0
    with file.open() as opened:
        try:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(name, done, max(file.size_bytes, done))
        except OSError as error:
            raise error_from_unreadable(file.path, error) from error
    return CheckpointFile(name, done, digest.hexdigest())


def check_sha256(file: CheckpointFile, expected: str | None, where: str) -> None:
    """InputError when the file is not the one that `expected` pins; None pins nothing."""
    if expected is not None and file.sha256 != expected.lower():
        raise InputError(
            "the file is not the one that is pinned: its sha256 differs",
            where=where,
            expected=f"sha256 {expected.lower()}",
            got=f"sha256 {file.sha256} ({file.size_bytes} bytes)",
            fix="the file is damaged, cut off or another version: delete it and download it again",
        )


def error_from_unreadable(path: Path, error: OSError) -> VlmExportError:
    """The error for a file that the system does not let us read: the machine's, or the file's."""
    return machine_fault(error, str(path)) or InputError(
        "a file of the checkpoint cannot be read", where=str(path), got=str(error)
    )


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns
