"""What a process takes of the machine, as Linux tells it, and giving back what it has freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path


def anonymous_bytes(process: int | str = "self") -> int | None:
    """RssAnon of a process: memory that is no file's; None outside Linux, and of a process that has ended."""
    size = _field("RssAnon:", process)
    return None if size is None else size * 1024


def peak_bytes() -> int | None:
    """VmHWM of this process: the most that it had in memory at once, pages of mapped files included; None outside
    Linux."""
    size = _field("VmHWM:")
    return None if size is None else size * 1024


def thread_count() -> int | None:
    """Threads of this process, also those of libraries; None outside Linux."""
    return _field("Threads:")


def return_freed_memory() -> None:
    """Gives it back to the system, so that an engine that was closed, or has packed its weights, takes nothing from the
    next one; where the C library can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _field(name: str, process: int | str = "self") -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines if line.startswith(name)]
    return int(fields[0][1]) if fields else None
