"""What this process takes of the machine, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """RssAnon of this process: memory that is no file's; None outside Linux."""
    size = _field("RssAnon:")
    return None if size is None else size * 1024


def thread_count() -> int | None:
    """Threads of this process, also those of libraries; None outside Linux."""
    return _field("Threads:")


def _field(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines if line.startswith(name)]
    return int(fields[0][1]) if fields else None
