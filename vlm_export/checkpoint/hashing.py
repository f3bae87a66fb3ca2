"""sha256 of the files of a checkpoint, streamed, and the comparison with a pinned value."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from vlm_export.checkpoint.seen_file import SeenFile, error_from_unreadable
from vlm_export.errors import InputError
from vlm_export.family import CheckpointFile

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes done and the bytes in all."""
_CHUNK_BYTES = 4 << 20


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
            expected=expected.lower(),
            got=f"{file.sha256} ({file.size_bytes} bytes)",
            fix="the file is damaged, cut off or another version: delete it and download it again",
        )
