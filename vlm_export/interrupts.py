"""Ctrl-C and SIGTERM: both unwind as KeyboardInterrupt, and neither is lost.

Python drops what a signal's handler raises inside a finalizer or a callback ("Note on Signal Handlers and Exceptions"
in the documentation of `signal`), and libraries catch too much. So an interrupt is remembered, and raised again at the
next point that asks.

An interrupted command has changed nothing, and its exit status says so. So from the step on that puts a result in
place, an interrupt is not heard any more: the command ends what is left, and says that it is done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
_deferred: list[int] = []
# Past the point of no return: interrupts are deferred.
_deferring = False
_in_command = False


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Around a command, in the main thread. A signal that the process was started to ignore stays ignored."""
    global _in_command, _deferring
    with _handled(_interrupt):
        _in_command = True
        try:
            yield
        finally:
            _in_command = _deferring = False
            _received.clear()


@contextmanager
def point_of_no_return() -> Iterator[None]:
    """Around the step that puts a result in place and the cleaning up behind it.

    An interrupt from before is raised first. In a command, none is heard from here to the command's end, unless the
    step fails. Elsewhere one that comes meanwhile is delivered afterwards.

    Raises:
        KeyboardInterrupt: before anything is done.
    """
    global _deferring
    raise_remembered()
    if _in_command:
        # One assignment: an interrupt comes before it, and nothing has been done, or after it.
        _deferring = True
        try:
            yield
        except BaseException:
            _deferring = False
            raise
        return
    _deferred.clear()
    with _handled(_defer):
        yield
    for number in tuple(_deferred):
        signal.raise_signal(number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles both signals, in the main thread, where Python runs handlers; those that are ignored stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    given = {number: signal.getsignal(number) for number in _SIGNALS}
    # None: not installed from Python, and so not to be put back.
    mine = {number: before for number, before in given.items() if before not in (signal.SIG_IGN, None)}
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in mine.items():
            signal.signal(number, before)


def raise_remembered() -> None:
    """KeyboardInterrupt if a signal came since the command began: whoever swallowed it should not have."""
    if _received:
        raise KeyboardInterrupt


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if not _deferring:
        _received.append(number)
        raise KeyboardInterrupt


def _defer(number: int, _frame: FrameType | None) -> None:
    _deferred.append(number)
