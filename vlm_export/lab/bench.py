"""What a bundle's variants cost on this machine, in each engine: all sides in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vlm_export.bundle.manifest import PartRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, VlmExportError
from vlm_export.lab.bench_plan import (
    EXACT,
    BenchOptions,
    Load,
    Side,
    chosen_parts,
    has_variant,
    loads_of,
    save_arrays,
    sides_of,
)
from vlm_export.lab.bench_process import SideProcess
from vlm_export.lab.bench_result import BenchResult, Cost, Measured
from vlm_export.lab.real_inputs import real_inputs
from vlm_export.lab.timing import interleaved
from vlm_export.proof.metrics import compare
from vlm_export.runtime.engines.choice import ONNXRUNTIME, chosen_precision

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
    """Measures every side on every load of every part, each side in a process of its own.

    A side that cannot run is left out, and the result says why.

    Args:
        bundle: the bundle's directory.
        sides: who computes, the one that the others are compared with first; None for what the options lead to.

    Raises:
        InputError: no bundle, a damaged one, or one without recorded inputs for what was asked.
        UsageError: a part, an engine, a precision or a size that there is not.
    """
    options = options or BenchOptions()
    opened = open_bundle(bundle)
    chosen = sides_of(opened.manifest, options) if sides is None else sides
    measured: list[Measured] = []
    costs: list[Cost] = []
    not_run: list[str] = []
    for part in chosen_parts(opened.manifest, options.parts):
        loads = loads_of(opened, part, options)
        if not loads:
            not_run.append(f"{part.name}: the bundle has no inputs for it on record")
            continue
        with TemporaryDirectory(prefix="vlm-export-") as folder:
            bench_of_part = _PartBench(opened, part, loads, options, Path(folder), progress)
            with bench_of_part.started(chosen, not_run) as processes:
                if processes:
                    measured += bench_of_part.measured(processes)
                    costs += bench_of_part.costs(processes)
    tasks = tuple(str(task.kind) for task in opened.manifest.tasks)
    if not measured:
        raise InputError("nothing could be measured", where=str(bundle), got="; ".join(not_run))
    return BenchResult(str(bundle), tasks, options, tuple(measured), tuple(costs), tuple(not_run))


class _PartBench:
    """One part: its loads' inputs in files, which the sides read."""

    def __init__(
        self,
        bundle: OpenBundle,
        part: PartRecord,
        loads: Mapping[Load, Mapping[str, Any]],
        options: BenchOptions,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._bundle, self._part, self._options = bundle, part, options
        self._folder, self._progress = folder, progress
        self._loads = {load: self._saved(f"load-{i}", inputs) for i, (load, inputs) in enumerate(loads.items())}
        self._peaks: dict[Side, dict[str, int | None]] = {}

    def _saved(self, name: str, arrays: Mapping[str, Any]) -> str:
        path = self._folder / f"{name}.npz"
        save_arrays(path, arrays)
        return str(path)

    @contextmanager
    def started(self, sides: Sequence[Side], not_run: list[str]) -> Iterator[dict[Side, SideProcess]]:
        """The sides that open, one after the other, so that none loads while another one does."""
        with ExitStack() as stack:
            found = {}
            for number, side in enumerate(sides):
                self._progress(f"open {self._part.name}", number, len(sides))
                if not has_variant(self._part, self._bundle.manifest, side):
                    continue
                try:
                    process = self._start(side)
                    stack.callback(process.close)
                    self._warm_up(process)
                except VlmExportError as error:
                    not_run.append(f"{self._part.name}, {side.label}: {error.what}: {error.got}")
                    continue
                found[side] = process
            yield found

    def _start(self, side: Side) -> SideProcess:
        job = {"bundle": str(self._bundle.root), "part": self._part.name, "source": self._options.against}
        return SideProcess({**job, **side.to_json(), "in_bf16": side.in_bf16})

    def _warm_up(self, process: SideProcess) -> None:
        process.ask(time=next(iter(self._loads.values())), calls=1, warm=0)

    def measured(self, processes: Mapping[Side, SideProcess]) -> list[Measured]:
        found = []
        for load, path in self._loads.items():
            turns = {side.label: _turn(process, path) for side, process in processes.items()}
            told = partial(self._told, load.label)
            told(0)
            times = interleaved(turns, self._options.rounds, told)
            self._peaks = {side: process.ask(memory=True) for side, process in processes.items()}
            found += [Measured(side, load, tuple(times[side.label])) for side in processes]
        return found

    def _told(self, what: str, number: int) -> None:
        self._progress(what, number, self._options.rounds)

    def costs(self, processes: Mapping[Side, SideProcess]) -> list[Cost]:
        """After all loads: what each side takes, and what it computes on the bundle's real inputs."""
        cosines = self._cosines(processes)
        return [
            Cost(
                side,
                self._part.name,
                load_seconds=process.load_seconds,
                peak_bytes=self._peaks[side]["peak_bytes"],
                anonymous_bytes=self._peaks[side]["anonymous_bytes"],
                size_bytes=self._size(side),
                cosine=cosines.get(side),
            )
            for side, process in processes.items()
        ]

    def _size(self, side: Side) -> int | None:
        if not side.is_of_bundle:
            return None
        manifest = self._bundle.manifest
        variant = self._part.variant(chosen_precision(manifest, side.precision).variant)
        return sum(manifest.files[name].size_bytes for name in (variant.file, *variant.external_data))

    def _cosines(self, processes: Mapping[Side, SideProcess]) -> dict[Side, float]:
        """Each side's least cosine with float32 in ONNX Runtime; none where the bundle has no float32."""
        exact = Side(ONNXRUNTIME, EXACT, 1)
        if not has_variant(self._part, self._bundle.manifest, exact):
            return {}
        paths = [self._saved(f"real-{i}", inputs) for i, inputs in enumerate(real_inputs(self._bundle, self._part))]
        given = next((side for side in processes if (side.engine, side.precision) == (ONNXRUNTIME, EXACT)), None)
        process = self._start(exact) if given is None else processes[given]
        try:
            process.ask(outputs=paths, to=str(self._folder / "exact"))
        finally:
            if given is None:
                process.close()
        found = {}
        for number, (side, process) in enumerate(processes.items()):
            self._progress(f"compare {self._part.name}", number, len(processes))
            process.ask(outputs=paths, to=str(self._folder / f"side-{number}"))
            found[side] = self._least_cosine(f"side-{number}", len(paths))
        return found

    def _least_cosine(self, name: str, count: int) -> float:
        cosines = []
        for number in range(count):
            with (
                np.load(self._folder / f"exact-{number}.npz") as expected,
                np.load(self._folder / f"{name}-{number}.npz") as got,
            ):
                cosines += [compare(expected[key], got[key]).cosine for key in expected]
        return float(np.min(cosines))


def _turn(process: SideProcess, path: str) -> Callable[[], float]:
    """One turn of a side: as many runs as fill it, after a run that wakes it up where they are short."""
    process.ask(time=path, calls=1, warm=1)
    seconds = process.ask(time=path, calls=1, warm=0)["seconds"]
    calls = min(max(round(_TURN_SECONDS / max(seconds, 1e-9)), 1), _MOST_CALLS)
    return lambda: float(process.ask(time=path, calls=calls, warm=int(calls > 1))["seconds"])
