"""What Rust code writes to the standard error stream while it panics, held back where its failure is told by name.

The Rust library prints a panic's message, and its stack with RUST_BACKTRACE, to file descriptor 2 before Python sees an
exception; nothing of Python can keep it from that. So the descriptor is pointed at a temporary file around a call. That
is for the whole process, and what other threads write meanwhile follows after the call. A process that is not ours may
start others while the descriptor is away: there it is left alone, unless no other thread runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_STDERR = 2
_lock = threading.Lock()
_is_ours = False


@contextmanager
def own_process() -> Iterator[None]:
    """States that the whole process is this project's, as a command is."""
    global _is_ours
    before, _is_ours = _is_ours, True
    try:
        yield
    finally:
        _is_ours = before


@contextmanager
def panics_held() -> Iterator[None]:
    """Around a call into Rust: of what is written to standard error, the lines of a panic vanish where it raises."""
    if not (_is_ours or threading.active_count() == 1) or not _lock.acquire(blocking=False):
        yield
        return
    try:
        with tempfile.TemporaryFile() as held:
            saved = _point_at(held)
            panicked = False
            try:
                yield
            except BaseException as error:
                panicked = type(error).__name__ == "PanicException"
                raise
            finally:
                if saved is not None:
                    _give_back(saved, held, panicked)
    finally:
        _lock.release()


def _point_at(held: IO[bytes]) -> int | None:
    """Where descriptor 2 pointed before; None where it stays, because it is closed or there are no more."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
        saved = os.dup(_STDERR)
    except (OSError, ValueError):
        return None
    try:
        os.dup2(held.fileno(), _STDERR)
    except OSError:
        os.close(saved)
        return None
    return saved


def _give_back(saved: int, held: IO[bytes], panicked: bool) -> None:
    os.dup2(saved, _STDERR)
    os.close(saved)
    held.seek(0)
    written = held.read()
    if panicked:
        start = written.find(b"thread '")
        # Rust begins the message with a line of its own.
        written = written if start < 0 else written[:start].rstrip(b"\n")
    if written:
        try:
            os.write(_STDERR, written)
        except OSError:
            return
