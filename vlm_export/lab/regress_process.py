"""Runs one job of a regression test in a process of its own, so that neither its memory nor its end is the others'."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any

from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.errors import (
    Defect,
    EnvironmentFailure,
    InputError,
    UsageError,
    VerificationError,
    VlmExportError,
)
from vlm_export.text_display import Lines

Progress = Callable[[str, float, int | None], None]
"""Told of each stage that has ended: its name, seconds, and peak of anonymous memory in bytes."""

_COMMAND = [sys.executable, "-m", "vlm_export.lab.regress_worker"]
_SAMPLE_SECONDS = 0.02
_LAST_LINES = 5
_GIB = 1 << 30
_KINDS = {kind.kind: kind for kind in (VerificationError, UsageError, InputError, EnvironmentFailure, Defect)}


@dataclass(frozen=True)
class Answer:
    """What came of a job.

    Attributes:
        result: JSON data, None where there is an error.
        error: what the job raised, or how its process ended.
        peak_bytes: of its anonymous memory; None outside Linux.
    """

    result: Any
    error: VlmExportError | None
    peak_bytes: int | None


def run_job(job: Mapping[str, Any], *, max_memory_bytes: int | None = None, progress: Progress | None = None) -> Answer:
    """Runs a job (`regress_worker`) and waits for it.

    Args:
        max_memory_bytes: of anonymous memory; the process is ended when it takes more.

    Raises:
        EnvironmentFailure: a bound, where the system does not tell what a process takes.
    """
    if max_memory_bytes is not None and anonymous_bytes() is None:
        raise EnvironmentFailure("this system does not tell how much memory a process takes", fix="leave the bound out")
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process,
    ):
        watch = _MemoryWatch(process, max_memory_bytes)
        try:
            answer = _conversation(process, job, progress)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
            watch.stop()
        if watch.too_much:
            return Answer(None, _too_much(watch.peak_bytes, max_memory_bytes), watch.peak_bytes)
        if "error" in answer:
            return Answer(None, error_from_json(answer["error"]), watch.peak_bytes)
        if "result" not in answer:
            return Answer(None, ended(process.returncode, errors), watch.peak_bytes)
        return Answer(answer["result"], None, watch.peak_bytes)


def error_from_json(data: Mapping[str, Any]) -> VlmExportError:
    """The error that `VlmExportError.to_json` described."""
    texts = {name: str(data.get(name, "")) for name in ("where", "expected", "got", "fix")}
    return _KINDS.get(data["error"], InputError)(data["what"], **texts)


def _conversation(process: subprocess.Popen[str], job: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    answer: dict[str, Any] = {}
    with suppress(BrokenPipeError), process.stdin:  # A process that could not start says so by its status.
        # YAML has dates, which no option takes; they are told as texts.
        json.dump(job, process.stdin, default=str)
    for line in process.stdout:
        said = json.loads(line)
        if "stage" not in said:
            answer = said
        elif progress is not None:
            stage = said["stage"]
            progress(stage["name"], stage["seconds"], stage["peak_anonymous_bytes"])
    return answer


def _too_much(peak_bytes: int | None, bound: int | None) -> VlmExportError:
    return EnvironmentFailure(
        "the process took more memory than it may, and was ended",
        expected=f"at most {(bound or 0) / _GIB:.3g} GiB",
        got=f"{(peak_bytes or 0) / _GIB:.3g} GiB",
        fix="raise --max-memory",
    )


def ended(status: int, errors: IO[bytes]) -> VlmExportError:
    """How a process ended that should have answered, with the last lines of what it printed."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").splitlines()[-_LAST_LINES:]
    how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    fix = "the system may have run out of memory" if status == -signal.SIGKILL else ""
    return Defect("the process ended before it answered", got=Lines(how + Lines.of(lines)), fix=fix)


class _MemoryWatch:
    """Samples a process's anonymous memory, and ends the process that takes too much."""

    def __init__(self, process: subprocess.Popen[str], bound: int | None) -> None:
        self.peak_bytes: int | None = None
        self.too_much = False
        self._process, self._bound, self._stop = process, bound, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            size = anonymous_bytes(self._process.pid)
            if size is None:
                return
            self.peak_bytes = max(self.peak_bytes or 0, size)
            if self._bound is not None and size > self._bound:
                self.too_much = True
                self._process.kill()
                return
