"""What a bundle's variants cost on this machine, in each engine: all sides in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, VlmExportError
from vlm_export.lab.bench_plan import EXACT, BenchOptions, Side, sides_of
from vlm_export.lab.bench_process import SideProcess
from vlm_export.lab.bench_result import BenchResult, Cost, Measured
from vlm_export.lab.bench_subjects import WRITING, Subject, subjects_of
from vlm_export.lab.timing import interleaved
from vlm_export.proof.metrics import compare
from vlm_export.runtime.engines.choice import ONNXRUNTIME

Progress = Callable[[str, int, int], None]
"""Told of what is done: its name, and how much of it, of how much."""
# A turn lasts at least this long: what wakes up with a shorter one is not what is measured.
_TURN_SECONDS = 0.03
_MOST_CALLS = 200


def bench(
    bundle: str | Path,
    options: BenchOptions | None = None,
    *,
    sides: Sequence[Side] | None = None,
    progress: Progress = lambda *_: None,
) -> BenchResult:
    """Measures every side on every load of every part or task, each side in a process of its own.

    A side that cannot run is left out, and the result says why.

    Args:
        bundle: the bundle's directory.
        sides: who computes, the one that the others are compared with first; None for what the options lead to.

    Raises:
        InputError: no bundle, a damaged one, one without recorded inputs for what was asked, or an unreadable image.
        UsageError: a part, a task, an engine, a precision or a size that there is not.
    """
    options = options or BenchOptions()
    opened = open_bundle(bundle)
    measured: list[Measured] = []
    costs: list[Cost] = []
    not_run: list[str] = []
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        for subject in subjects_of(opened, options, Path(folder)):
            if not subject.loads:
                not_run.append(f"{subject.name}: the bundle has no inputs for it on record")
                continue
            chosen = sides_of(opened.manifest, options, subject.task) if sides is None else sides
            bench_of_subject = _SubjectBench(opened, subject, options, Path(folder), progress)
            with bench_of_subject.started(chosen, not_run) as processes:
                if processes:
                    measured += bench_of_subject.measured(processes)
                    costs += bench_of_subject.costs(processes)
    tasks = tuple(str(task.kind) for task in opened.manifest.tasks)
    if not measured:
        raise InputError("nothing could be measured", where=str(bundle), got="; ".join(not_run))
    return BenchResult(str(bundle), tasks, options, tuple(measured), tuple(costs), tuple(not_run))


class _SubjectBench:
    """One part or task."""

    def __init__(
        self, bundle: OpenBundle, subject: Subject, options: BenchOptions, folder: Path, progress: Progress
    ) -> None:
        self._bundle, self._subject, self._options = bundle, subject, options
        self._folder, self._progress = folder, progress
        self._peaks: dict[Side, dict[str, int | None]] = {}

    @contextmanager
    def started(self, sides: Sequence[Side], not_run: list[str]) -> Iterator[dict[Side, SideProcess]]:
        """The sides that open, one after the other, so that none loads while another one does."""
        with ExitStack() as stack:
            found = {}
            for number, side in enumerate(sides):
                self._progress(f"open {self._subject.name}", number, len(sides))
                if not self._subject.has_variant(self._bundle.manifest, side):
                    continue
                try:
                    process = self._start(side)
                    stack.callback(process.close)
                    self._warm_up(process)
                except VlmExportError as error:
                    not_run.append(f"{self._subject.name}, {side.label}: {error.what}: {error.got}")
                    continue
                found[side] = process
            yield found

    def _start(self, side: Side) -> SideProcess:
        job = {"bundle": str(self._bundle.root), "source": self._options.against, **self._subject.job}
        return SideProcess({**job, **side.to_json(), "in_bf16": side.in_bf16})

    def _warm_up(self, process: SideProcess) -> None:
        process.ask(time=next(iter(self._subject.loads.values())), calls=1, warm=0)

    def measured(self, processes: Mapping[Side, SideProcess]) -> list[Measured]:
        found = []
        for load, about in self._subject.loads.items():
            turns = {side.label: _turn(process, about) for side, process in processes.items()}
            told = partial(self._told, load.label)
            told(0)
            times = interleaved(turns, self._options.rounds, told)
            self._peaks = {side: process.ask(memory=True) for side, process in processes.items()}
            found += [Measured(side, load, tuple(times[side.label])) for side in processes]
        return found

    def _told(self, what: str, number: int) -> None:
        self._progress(what, number, self._options.rounds)

    def costs(self, processes: Mapping[Side, SideProcess]) -> list[Cost]:
        """After all loads: what each side takes, and what it computes on real inputs."""
        agreed = self._agreed(processes)
        writes = self._subject.task in WRITING
        return [
            Cost(
                side,
                self._subject.name,
                load_seconds=process.load_seconds,
                peak_bytes=self._peaks[side]["peak_bytes"],
                anonymous_bytes=self._peaks[side]["anonymous_bytes"],
                size_bytes=self._subject.size_bytes(self._bundle.manifest, side),
                cosine=None if writes else agreed.get(side),
                same_tokens=agreed.get(side) if writes else None,
            )
            for side, process in processes.items()
        ]

    def _agreed(self, processes: Mapping[Side, SideProcess]) -> dict[Side, float]:
        """How far each side agrees with float32 in ONNX Runtime; empty where the bundle has no float32."""
        exact = Side(ONNXRUNTIME, EXACT, 1)
        if not self._subject.has_variant(self._bundle.manifest, exact):
            return {}
        compared = list(self._subject.compared)
        given = next((side for side in processes if (side.engine, side.precision) == (ONNXRUNTIME, EXACT)), None)
        process = self._start(exact) if given is None else processes[given]
        try:
            process.ask(outputs=compared, to=str(self._folder / "exact"))
        finally:
            if given is None:
                process.close()
        found = {}
        for number, (side, process) in enumerate(processes.items()):
            self._progress(f"compare {self._subject.name}", number, len(processes))
            process.ask(outputs=compared, to=str(self._folder / f"side-{number}"))
            found[side] = self._agreement(f"side-{number}", len(compared))
        return found

    def _agreement(self, name: str, count: int) -> float:
        """The least cosine of a row, or the mean share of a row's tokens that come before another one."""
        found = []
        for number in range(count):
            with (
                np.load(self._folder / f"exact-{number}.npz") as expected,
                np.load(self._folder / f"{name}-{number}.npz") as got,
            ):
                if self._subject.task in WRITING:
                    same = np.cumprod(expected["tokens"] == got["tokens"], axis=1)
                    return float(same.mean())
                found += [compare(expected[key], got[key]).cosine for key in expected]
        return float(np.min(found))


def _turn(process: SideProcess, about: Any) -> Callable[[], float]:
    """One turn of a side: as many runs as fill it, after a run that wakes it up where they are short."""
    process.ask(time=about, calls=1, warm=1)
    seconds = process.ask(time=about, calls=1, warm=0)["seconds"]
    calls = min(max(round(_TURN_SECONDS / max(seconds, 1e-9)), 1), _MOST_CALLS)
    return lambda: float(process.ask(time=about, calls=calls, warm=int(calls > 1))["seconds"])
