"""Ctrl-C and SIGTERM: both unwind as KeyboardInterrupt, neither is lost, and an engine that computes lets them through.

Python drops what a signal's handler raises inside a finalizer or a callback ("Note on Signal Handlers and Exceptions"
in the documentation of `signal`), and libraries catch too much. So an interrupt is remembered, and raised again at the
next point that asks. Nor does Python run a handler while the main thread is inside a library: long work of that kind
is done by another thread, for which the main thread waits (`run_interruptibly`).

An interrupted command has changed nothing, and its exit status says so. So from the step on that puts a result in
place, an interrupt is not heard any more: the command ends what is left, and says that it is done.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

INTERRUPTED = 130
GRACE_SECONDS = 5.0
"""From SIGTERM until the process ends in any case."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What sends a signal to a process and to its group, as `timeout` does, is no second Ctrl-C.
_ONE_PRESS_SECONDS = 0.1
_SIGNALS_SEEN_SECONDS = 0.2
_LOG_FATAL_ONLY = 4
_received: list[tuple[int, float]] = []
_deferred: list[int] = []
# Past the point of no return: interrupts are deferred.
_deferring = False
_in_command = False


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Around a command, in the main thread. A signal that the process was started to ignore stays ignored.

    The first signal raises KeyboardInterrupt. A Ctrl-C after it ends the process at once, with status 130 and whatever
    is running; so does SIGTERM once GRACE_SECONDS are over. What was being written then is left to the next run.
    """
    global _in_command, _deferring
    with _handled(_interrupt):
        _in_command = True
        try:
            yield
        finally:
            _in_command = _deferring = False
            _received.clear()
            _grace.cancel()


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


def run_interruptibly(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """What `work` returns or raises. A signal whose handler raises, the user's own too, is let through meanwhile.

    Args:
        work: runs in another thread where this is the main one, which alone takes signals.
        stop: called from this thread when a handler raised; makes `work` end soon. The exception goes on once it has
            ended; a second one does not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    job = _Job(work)
    try:
        if not _give(job):
            return work()
        job.wait()
    except BaseException:
        if not job.done.is_set():
            stop()
            job.wait()
        raise
    return job.result()


def start_session(*arguments: Any, **options: Any) -> Any:
    """An `InferenceSession` of ONNX Runtime; while it starts, a second Ctrl-C ends the process."""
    from onnxruntime import InferenceSession

    return run_interruptibly(lambda: InferenceSession(*arguments, **options))


def run_session(session: Any, feeds: Mapping[str, Any], names: list[str] | None = None) -> list[Any]:
    """`InferenceSession.run` of ONNX Runtime, which a signal ends between two nodes, also within a loop.

    Nothing is logged: what ONNX Runtime has to say about a failure is in the exception.
    """
    from onnxruntime import RunOptions

    options = RunOptions()
    options.log_severity_level = _LOG_FATAL_ONLY

    def stop() -> None:
        options.terminate = True

    outputs: list[Any] = run_interruptibly(lambda: session.run(names, dict(feeds), options), stop)
    return outputs


class _Job(Generic[T]):
    """A piece of work, what came of it, and whether it has ended.

    It holds neither the work nor the result longer than needed: a worker remembers its last job, and an engine that was
    closed would stay in memory with it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.done = threading.Event()
        self._work = work
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error
        finally:
            del self._work
            self.done.set()

    def wait(self) -> None:
        """Returns when the work has ended; handlers run meanwhile, also of a signal that came to another thread."""
        while not self.done.wait(_SIGNALS_SEEN_SECONDS):
            pass

    def result(self) -> T:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error
        return self._results.pop()


class _Worker:
    """A thread that does one job after the other."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job[Any]] = SimpleQueue()
        self._last: _Job[Any] | None = None
        threading.Thread(target=self._serve, daemon=True, name="vlm-export engine").start()

    @property
    def is_idle(self) -> bool:
        return self._last is None or self._last.done.is_set()

    def give(self, job: _Job[Any]) -> None:
        self._last = job
        self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            self._jobs.get().run()


_workers: list[_Worker] = []
if hasattr(os, "register_at_fork"):
    # A child has the main thread alone.
    os.register_at_fork(after_in_child=_workers.clear)


def _give(job: _Job[Any]) -> bool:
    """Whether a thread does the job: one that a second interrupt left at work is not waited for, and where the system
    starts no more threads there is none."""
    if not _workers or not _workers[-1].is_idle:
        try:
            _workers[:] = [_Worker()]
        except RuntimeError:
            return False
    _workers[-1].give(job)
    return True


class _Grace:
    """The end of the process some time after SIGTERM."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(GRACE_SECONDS, _end)
            self._timer.daemon = True
            with suppress(RuntimeError):  # The system starts no more threads.
                self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_grace = _Grace()


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if _deferring:
        return
    is_first, now = not _received, time.monotonic()
    if number == signal.SIGINT and not is_first and now - _received[-1][1] > _ONE_PRESS_SECONDS:
        _end()
    _received.append((number, now))
    if number == signal.SIGTERM:
        _grace.start()
    if is_first:
        raise KeyboardInterrupt


def _end() -> None:
    """Without unwinding: what should have unwound is what does not end."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _defer(number: int, _frame: FrameType | None) -> None:
    _deferred.append(number)
