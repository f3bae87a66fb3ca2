"""Kills writers with SIGKILL at each of their file operations, and checks what they leave.

Writers are Python functions that run in forked children. Load this file by path (see `conftest.py`), because test
directories are no packages.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Audit events (PEP 578) of the calls that change what is on the disk.
FILE_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock"})
_KILLED, _ENDED = -signal.SIGKILL, 0
# Added to the status of a command that ended before it got its signal; larger than 130 would not fit in a byte.
_NOT_SENT = 131


def forked(work: Callable[[], object]) -> int:
    """Runs `work` in a child process and returns its id; the child's exit status is 1 when it raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_at_each_step(
    work: Callable[[], object], check: Callable[[], object], *, first: int = 1, every: int = 1, most: int = 1000
) -> int:
    """Runs `work` in children that kill themselves just before file operation `first`, the next, …, until one ends.

    Args:
        every: only each so-manieth operation, for work that takes long.

    Returns:
        The number of children that were killed.
    """
    for killed, step in enumerate(range(first, most, every)):
        pid = forked(lambda step=step: _run_until(work, step))  # type: ignore[misc]  # bound now, not at the call
        ended = _ended(pid)
        check()
        if ended:
            return killed
    raise AssertionError(f"the work has not ended within {most} file operations")


def kill_and_repeat_at_each_step(
    folder: Path, work: Callable[[], object], check: Callable[[], object], repeat: Callable[[], object]
) -> int:
    """As `kill_at_each_step`, in a folder that begins the same each time.

    After each kill `check` looks at what is left, `repeat` is the next run, and `check` looks again. Then nothing of
    the killed run may lie beside its result.
    """
    before = folder.with_name("before")
    shutil.copytree(folder, before)

    def check_and_reset() -> None:
        check()
        repeat()
        check()
        assert not [name for name in os.listdir(folder) if ".vlm-export" in name]
        shutil.rmtree(folder)
        shutil.copytree(before, folder)

    return kill_at_each_step(work, check_and_reset)


def interrupt_at_each_step(
    work: Callable[[], int], check: Callable[[int], object], number: signal.Signals, *, most: int = 1000
) -> int:
    """Runs `work`, a command that returns its exit status, in children that get a signal before each file operation.

    `check` gets the status of each. Returns the number of children that got the signal.
    """
    for step in range(1, most):
        pid = forked_command(lambda step=step: _run_until(work, step, number))  # type: ignore[misc]  # as above
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # A signal that comes before the command hears it ends the process as usual.
        check(130 if status == -number else status % _NOT_SENT)
        if status >= _NOT_SENT:
            return step - 1
    raise AssertionError(f"the work has not ended within {most} file operations")


def forked_command(work: Callable[[], int]) -> int:
    """As `forked`; the child's exit status is what `work` returns, 1 when it raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = work()
    except KeyboardInterrupt:
        # Before the command heard signals itself, or after.
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception that it raises, from a child process, which may change its limits."""
    read_end, write_end = os.pipe()

    def report() -> None:
        try:
            result = work()
        except Exception as error:
            result = error
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump((type(result).__name__, getattr(result, "exit_status", None), str(result)), pipe)

    with os.fdopen(read_end, "rb") as pipe:
        pid = forked(report)
        os.close(write_end)
        content = pipe.read()
    assert _ended(pid)
    return pickle.loads(content)


@contextmanager
def running(work: Callable[[Callable[[], None]], object]) -> Iterator[int]:
    """A child that runs `work(ready)`; enters once it has called `ready`, kills it on leaving."""
    read_end, write_end = os.pipe()
    pid = forked(lambda: work(lambda: _write_ready(write_end)))
    os.close(write_end)
    try:
        assert os.read(read_end, 1) == b"r"
        yield pid
    finally:
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _write_ready(descriptor: int) -> None:
    os.write(descriptor, b"r")


def _run_until(work: Callable[[], object], step: int, number: signal.Signals = signal.SIGKILL) -> int:
    """What `work` returns, and more by `_NOT_SENT` when it ended before that step."""
    count = 0

    def audit(event: str, _: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS or event == "ctypes.dlsym":
            count += 1
            if count == step:
                signal.raise_signal(number)

    sys.addaudithook(audit)
    status = work()
    return (status if isinstance(status, int) else 0) + (_NOT_SENT if count < step else 0)


def _ended(pid: int) -> bool:
    """Waits; True when the process ended successfully by itself, False when SIGKILL ended it."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (_KILLED, _ENDED), f"the process failed by itself with exit status {status}"
    return status == _ENDED
