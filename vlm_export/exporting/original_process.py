"""A process of its own for the original, which computes ahead what the proof will ask for.

It is a fork of this process that computes with one thread: it has the model's mapped weights without reading anything
again, and imports the original's library while this one is in the back end. Of torch's threads a fork inherits none,
and one thread needs none. A second thread answers meanwhile. What has been computed is asked for by a digest of the
inputs; what has not is computed when it is asked for, so what is computed ahead decides about nothing but time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeAlias

from vlm_export.errors import Defect, EnvironmentFailure
from vlm_export.proof.cached_reference import arrays_digest

_HELD_BYTES = 256 << 20
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl
_KNOWN, _UNKNOWN, _FAILED = "known", "unknown", "failed"

Call: TypeAlias = tuple[Any, ...]
"""The name of a method, and its arguments."""


class OriginalProcess:
    """A forked process, and the way to ask it.

    Attributes:
        pid: 0 once it has ended.
        misses: calls that were not expected.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self.pid = connection, pid
        self.misses = 0

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object that was given to `start_process` gives there.

        Raises:
            EnvironmentFailure: the process was killed, as the system does where memory is short.
            Defect: it has ended by itself, and said why on stderr.
            Exception: what the method raised.
        """
        call = (method, *arguments)
        try:
            self._connection.send(_key(call))
            state, given = self._connection.recv()
            if state == _UNKNOWN:
                self.misses += 1
                self._connection.send(call)
                state, given = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if state == _FAILED:
            raise given
        return given

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._connection.close()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0

    def _ended(self) -> EnvironmentFailure | Defect:
        what = "the process that runs the original has ended"
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return Defect(what, got="another part of this program has waited for it")
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return Defect(what, got=f"exit status {code}")
        got = f"signal {signal.Signals(-code).name}"
        return EnvironmentFailure(what, got=got, fix="free memory, or use a machine with more")


def start_process(here: object, expected: Iterator[Call]) -> OriginalProcess | None:
    """Another process that has `here`; None where the system forks none, or not safely (macOS' own libraries).

    Args:
        here: whose methods are called there.
        expected: calls to compute ahead, made there as well.
    """
    if sys.platform != "linux":
        return None
    ours, theirs = Pipe()
    for stream in (sys.stdout, sys.stderr):
        # What is left in them would be written twice.
        if stream is not None:
            stream.flush()
    parent = os.getpid()
    try:
        with warnings.catch_warnings():
            # Python warns of threads, whose locks a fork may find taken: torch and the engine take none between calls.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        return None
    if pid:
        theirs.close()
        return OriginalProcess(ours, pid)
    try:
        ours.close()
        _prepare(parent)
        _serve(theirs, here, expected)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _prepare(parent: int) -> None:
    """Of a new process: it ends with its parent, hears no Ctrl-C, and computes with one thread."""
    import torch

    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _serve(connection: Connection, here: object, expected: Iterator[Call]) -> NoReturn:
    """Computes what is expected in this thread and answers in another, until nobody asks any more."""
    answers = _Answers(here, expected)
    threading.Thread(target=_answer, args=(connection, answers), daemon=True).start()
    while True:
        answers.compute_next()


def _answer(connection: Connection, answers: _Answers) -> None:
    try:
        while True:
            key = connection.recv()
            if not answers.will_know(key):
                connection.send((_UNKNOWN, None))
                answers.ask(key, connection.recv())
            connection.send(answers.take(key))
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        # Who asked would wait for ever.
        traceback.print_exc()
        os._exit(1)


class _Answers:
    """What has been computed and what will be; one thread computes, another takes."""

    def __init__(self, here: object, expected: Iterator[Call]) -> None:
        self._here, self._expected, self._next = here, expected, next(expected, None)
        self._asked: tuple[bytes, Call] | None = None
        # Digest of a call → its state, what it gave or raised, and how many bytes that takes.
        self._known: dict[bytes, tuple[str, Any, int]] = {}
        self._told = set[bytes]()
        self._held = 0
        self._changed = threading.Condition()

    def compute_next(self) -> None:
        """Computes what was asked for, or else the next call that is expected; waits where there is neither."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked is not None or self._may_go_on)
            asked, self._asked = self._asked, None
            call = self._next
        if asked is not None:
            self._compute(*asked)
            return
        assert call is not None
        key = _key(call)
        if key not in self._known and key not in self._told:
            self._compute(key, call)
        following = next(self._expected, None)
        with self._changed:
            self._next = following
            self._changed.notify_all()

    def will_know(self, key: bytes) -> bool:
        """Whether a call is known, after all is computed that is expected, as far as it may be held: it may be among
        that, and the rest is needed as well."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._known or not self._may_go_on)
            return key in self._known

    def ask(self, key: bytes, call: Call) -> None:
        """Has a call computed before all others."""
        with self._changed:
            self._asked = key, call
            self._changed.notify_all()
            self._changed.wait_for(lambda: key in self._known)

    def take(self, key: bytes) -> tuple[str, Any]:
        """The state of a call that is known, and what it gave; what was taken is let go of where the room is filled."""
        with self._changed:
            state, given, _ = self._known[key]
            self._told.add(key)
            if self._held >= _HELD_BYTES:
                self._known = {each: answer for each, answer in self._known.items() if each not in self._told}
                self._held = sum(size for _, _, size in self._known.values())
                self._changed.notify_all()
            return state, given

    @property
    def _may_go_on(self) -> bool:
        """Whether a call is expected that is not computed, and there is room for what it gives."""
        return self._next is not None and self._held < _HELD_BYTES

    def _compute(self, key: bytes, call: Call) -> None:
        method, *arguments = call
        try:
            given = getattr(self._here, method)(*arguments)
            arrays = given.values() if method == "outputs" else ()
            answer = _KNOWN, given, sum(array.nbytes for array in arrays)
        except Exception as error:
            answer = _FAILED, _sendable(error), 0
        with self._changed:
            self._known[key] = answer
            self._held += answer[2]
            self._changed.notify_all()


def _sendable(error: Exception) -> Exception:
    """The error, or its text where it is of a class that does not come back from a pickle."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else RuntimeError(str(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _key(call: Call) -> bytes:
    """A digest of a call: its method, and what stands in its arguments."""
    digest = hashlib.sha256()
    for argument in call:
        digest.update(arrays_digest(argument) if isinstance(argument, Mapping) else f"{argument!r} ".encode())
    return digest.digest()
