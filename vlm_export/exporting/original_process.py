"""A process of its own for the original, which computes ahead what the proof will ask for.

It is a fork of this process with one thread: it has the model's mapped weights without reading anything again, and
imports the original's library while this one is in the back end. Of torch's threads a fork inherits none, and one
thread needs none. What it has computed is asked for by a digest of the inputs; what it has not is computed when it is
asked for, so what is computed ahead decides about nothing but time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from vlm_export.errors import EnvironmentFailure
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
            EnvironmentFailure: the process has ended, which the system does to it where memory is short.
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
            raise EnvironmentFailure(
                "the process that runs the original has ended",
                got=self._ended(),
                fix="free memory, or use a machine with more",
            ) from error
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

    def _ended(self) -> str:
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return "it was waited for elsewhere"
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def start_process(here: object, expected: Iterator[Call]) -> OriginalProcess | None:
    """Another process that has `here`; None where the system forks none, or not safely (macOS' own libraries).

    Args:
        here: whose methods are called there.
        expected: calls to compute ahead, made there as well.
    """
    if sys.platform != "linux":
        return None
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
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
    status = 1
    try:
        ours.close()
        _prepare(parent)
        _serve(theirs, here, expected)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


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


def _serve(connection: Connection, here: object, expected: Iterator[Call]) -> None:
    """Computes what is expected and answers what is asked, until nobody asks any more.

    What is asked for and not known may be expected later; so all that is expected is computed first, as far as it may
    be held.
    """
    answers = _Answers(here, expected)
    while True:
        try:
            if answers.may_go_on and not connection.poll():
                answers.go_on()
                continue
            key = connection.recv()
            while key not in answers.known and answers.may_go_on:
                answers.go_on()
            if key not in answers.known:
                connection.send((_UNKNOWN, None))
                answers.compute(key, connection.recv())
            connection.send(answers.known[key][:2])
        except (EOFError, OSError):
            return
        answers.told(key)


class _Answers:
    """What has been computed.

    Attributes:
        known: digest of a call → its state, what it gave or raised, and how many bytes that takes.
    """

    def __init__(self, here: object, expected: Iterator[Call]) -> None:
        self.known: dict[bytes, tuple[str, Any, int]] = {}
        self._here, self._expected, self._next = here, expected, next(expected, None)
        self._told = set[bytes]()
        self._held = 0

    @property
    def may_go_on(self) -> bool:
        """Whether a call is expected that is not computed, and there is room for what it gives."""
        return self._next is not None and self._held < _HELD_BYTES

    def go_on(self) -> None:
        """Computes the next call that is expected, unless it has been asked for before."""
        assert self._next is not None
        key = _key(self._next)
        if key not in self.known and key not in self._told:
            self.compute(key, self._next)
        self._next = next(self._expected, None)

    def compute(self, key: bytes, call: Call) -> None:
        """Makes a call known."""
        method, *arguments = call
        try:
            given = getattr(self._here, method)(*arguments)
        except Exception as error:
            self.known[key] = _FAILED, _sendable(error), 0
            return
        arrays = given.values() if method == "outputs" else ()
        self.known[key] = _KNOWN, given, sum(array.nbytes for array in arrays)
        self._held += self.known[key][2]

    def told(self, key: bytes) -> None:
        """Lets go of what was asked for, where what is held has filled its room."""
        self._told.add(key)
        if self._held >= _HELD_BYTES:
            self.known = {key: answer for key, answer in self.known.items() if key not in self._told}
            self._held = sum(size for _, _, size in self.known.values())


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
