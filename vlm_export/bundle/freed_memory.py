"""Memory that was freed and that the C library keeps."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Gives it back to the system, so that an engine that was closed, or has packed its weights, takes nothing from the
    next one; where the C library can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
