"""sha256 of files, several at once: hashlib releases the interpreter lock on large buffers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vlm_export.bundle.manifest import FileRecord

_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8

Key = TypeVar("Key")
Value = TypeVar("Value")


def record_from_descriptor(descriptor: int) -> FileRecord:
    """Size and sha256 of what can be read from an open file, from its position to its end."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def map_in_threads(function: Callable[[Key], Value], keys: Iterable[Key]) -> Mapping[Key, Value]:
    """`function` of each key, run side by side; the first error, in the order of the keys, is raised."""
    ordered = list(dict.fromkeys(keys))
    threads = min(len(ordered), os.cpu_count() or 1, _MAX_THREADS)
    if threads <= 1:
        return {key: function(key) for key in ordered}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(ordered, pool.map(function, ordered), strict=True))
