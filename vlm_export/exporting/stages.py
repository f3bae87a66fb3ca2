"""Stages of the main job: named in every error, timed, and with the peak of anonymous memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.memory import anonymous_bytes, return_freed_memory
from vlm_export.errors import VlmExportError
from vlm_export.interrupts import raise_remembered

_SAMPLE_SECONDS = 0.02

StepProgress = Callable[[int, int], None]
"""Called with the number of steps done and of all steps."""


@dataclass(frozen=True)
class StageRecord:
    """What a stage took; `peak_anonymous_bytes` is None where the system does not tell (outside Linux)."""

    name: str
    seconds: float
    peak_anonymous_bytes: int | None


class StageListener(Protocol):
    """Told of each stage as it happens: the command line draws it."""

    def started(self, name: str) -> None: ...

    def progressed(self, name: str, done: int, total: int) -> None: ...

    def finished(self, record: StageRecord) -> None: ...


class SilentListener:
    """Draws nothing."""

    def started(self, name: str) -> None:
        pass

    def progressed(self, name: str, done: int, total: int) -> None:
        pass

    def finished(self, record: StageRecord) -> None:
        pass


class Stages:
    """Runs stages and keeps their records."""

    def __init__(self, listener: StageListener | None = None) -> None:
        self.listener: StageListener = listener or SilentListener()
        self.records: list[StageRecord] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[StepProgress]:
        """Times the block; errors and interrupts that leave it name the stage.

        Yields:
            A callback for steps within the stage.
        """
        self.listener.started(name)
        start = time.perf_counter()
        with _PeakMemory() as memory:
            try:
                with environment_errors(name):
                    yield lambda done, total: self.listener.progressed(name, done, total)
                    raise_remembered()
            except VlmExportError as error:
                error.where = f"{error.where} (stage: {name})" if error.where else f"stage: {name}"
                raise
            except KeyboardInterrupt as interrupt:
                interrupt.args = (f"stage: {name}",)
                raise
        return_freed_memory()
        record = StageRecord(name, time.perf_counter() - start, memory.peak_bytes)
        self.records.append(record)
        self.listener.finished(record)


class _PeakMemory:
    """Samples this process's anonymous resident memory, which is what mapped weights must not add to."""

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._sample()
        if self.peak_bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.peak_bytes is not None:
            self._thread.join()
            self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        size = anonymous_bytes()
        if size is not None:
            self.peak_bytes = max(self.peak_bytes or 0, size)
