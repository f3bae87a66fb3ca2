"""How much memory the machine has left, and whether a graph's weights should stay in their file."""

from __future__ import annotations

from pathlib import Path

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_MAP_ABOVE_BYTES = 4 << 30
# What an engine may hold beyond a graph's weights: a second, repacked copy, and room to compute in.
_COPIES = 2.5


def available_bytes() -> int | None:
    """Memory that this process may still take without swapping: the system's, or its control group's (version 2) if
    that is less; None where the system does not tell (outside Linux)."""
    try:
        fields = dict(line.split(":", 1) for line in _SYSTEM.read_text(encoding="ascii").splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    left = _left_in_group()
    return available if left is None else min(available, left)


def keeps_weights_mapped(weights_bytes: int) -> bool:
    """Whether an engine should read such weights from their file instead of taking them into memory."""
    available = available_bytes()
    return weights_bytes > _MAP_ABOVE_BYTES or (available is not None and available < _COPIES * weights_bytes)


def _left_in_group() -> int | None:
    try:
        limit = int((_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(counts["inactive_file"]) + int(counts["active_file"])
    except (OSError, KeyError, ValueError):  # "max" is no number: no limit.
        return None
    return max(limit - used + cached, 0)
