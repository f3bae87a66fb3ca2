"""Ctrl-C and SIGTERM: both unwind as KeyboardInterrupt, and neither is lost.

Python drops what a signal's handler raises inside a finalizer or a callback ("Note on Signal Handlers and Exceptions"
in the documentation of `signal`), and libraries catch too much. So an interrupt is remembered, and raised again at the
next point that asks.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Around a command, in the main thread. A signal that the process was started to ignore stays ignored."""
    _received.clear()
    given = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in given.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in given.items():
            signal.signal(number, handler)
        _received.clear()


def raise_remembered() -> None:
    """KeyboardInterrupt if a signal came since the command began: whoever swallowed it should not have."""
    if _received:
        raise KeyboardInterrupt


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt
