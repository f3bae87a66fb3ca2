"""The same inputs through two graphs: how far each output is apart, and in which sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from vlm_export.errors import GraphError, InputError, UsageError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.prove.compare import largest_difference
from vlm_export.graph.prove.program import ModelProgram, RunError
from vlm_export.graph.prove.random_inputs import Run, load_feeds, random_runs
from vlm_export.lab.differences import Difference, OutputComparison
from vlm_export.lab.timing import interleaved, timed
from vlm_export.proof.metrics import compare

Arrays = Mapping[str, Array]
RunGraph = Callable[[Arrays], Arrays]
"""Inputs by name → outputs by name."""

LEAST_SAMPLES = 8
"""Fewer rows say little: many faults touch few of them."""
_ROUNDS = 7


def compare_outputs(
    inputs: Iterable[Arrays], left: RunGraph, right: RunGraph, where: str, tolerance: float
) -> tuple[OutputComparison, ...]:
    """Runs both on all inputs.

    Args:
        where: what stands before an output's name.
        tolerance: an output is equal where it differs by at most this times max(1, its largest absolute value).

    Returns:
        One comparison for each output that both have, over all samples: the rows of axis 0.
    """
    found: dict[str, list[_Rows]] = {}
    for feeds in inputs:
        expected = left(feeds)
        try:
            got = right(feeds)
        except InputError as error:
            unknown = float("nan")
            return (OutputComparison(where, 0, unknown, 0.0, unknown, None, error.got or error.what),)
        for name in expected:
            if name in got:
                found.setdefault(name, []).append(_Rows.of(expected[name], got[name]))
    return tuple(_merged(f"{where}.{name}" if where else name, rows, tolerance) for name, rows in found.items())


def output_differences(outputs: Iterable[OutputComparison]) -> list[Difference]:
    """One difference for each output that is not equal."""
    return [Difference("outputs", entry.where, _sentence(entry)) for entry in outputs if not entry.equal]


def _sentence(entry: OutputComparison) -> str:
    if entry.refusal:
        return f"cannot be run on inputs that the other takes: {entry.refusal}"
    if np.isnan(entry.max_abs):
        return "other shapes, or NaN in one of them"
    sample = "" if entry.worst_sample is None else f", most in sample {entry.worst_sample} of {entry.samples}"
    return f"differs by {entry.max_abs:.3g}{sample} (allowed {entry.bound:.3g}; smallest cosine {entry.cosine:.6f})"


class _Rows:
    """One output of one run: the largest difference of each row."""

    def __init__(self, gaps: Sequence[float], largest: float, cosine: float) -> None:
        self.gaps, self.largest, self.cosine = gaps, largest, cosine

    @classmethod
    def of(cls, expected: Array, got: Array) -> _Rows:
        if not isinstance(expected, np.ndarray) or not isinstance(got, np.ndarray):
            raise GraphError("only tensors can be compared", got="a sequence of tensors, or nothing")
        if expected.shape != got.shape:
            return cls([float("nan")], 0.0, float("nan"))
        comparison = compare(expected, got)
        if expected.ndim == 0:
            return cls([largest_difference(expected, got)[0]], comparison.max_reference_abs, comparison.cosine)
        gaps = [largest_difference(*pair)[0] for pair in zip(expected, got, strict=True)]
        return cls(gaps, comparison.max_reference_abs, comparison.cosine)


def _merged(where: str, runs: Sequence[_Rows], tolerance: float) -> OutputComparison:
    gaps = [gap for run in runs for gap in run.gaps]
    bound = tolerance * max(1.0, max(run.largest for run in runs))
    worst = float(np.max(gaps)) if gaps else 0.0
    place = int(np.argmax(gaps)) if gaps and worst > 0 else None
    cosines = [run.cosine for run in runs if run.gaps]
    return OutputComparison(where, len(gaps), worst, bound, float(np.min(cosines)) if cosines else 1.0, place)


def sample_inputs(model: ir.Model, files: Sequence[Path] = ()) -> list[Arrays]:
    """Inputs that a graph takes: those of the files, or random ones in several sizes, 8 rows or more.

    GraphError where the graph runs on none of them.
    """
    program = ModelProgram(model)
    if files:
        return [_telling(load_feeds(files, program.inputs), files)]
    refusals: list[RunError] = []

    def attempt(feeds: Mapping[str, Array]) -> Run | None:
        try:
            return Run(feeds, dict(zip(program.outputs, program.run(feeds, list(program.outputs)), strict=True)))
        except RunError as error:
            refusals.append(error)
            return None

    required = {name: value for name, value in program.inputs.items() if not value.is_initializer()}
    runs = [run.feeds for run in random_runs(required, {}, program.size_inputs(), attempt)]
    if not runs:
        raise GraphError(
            "the graph cannot be run on random inputs",
            got=refusals[0].got if refusals else "",
            fix="give inputs that it takes: --inputs FILE.npz",
        )
    generator = np.random.default_rng(0)
    for _ in range(LEAST_SAMPLES):
        if sum(map(row_count, runs)) >= LEAST_SAMPLES:
            break
        # Values that the graph takes, in other places: drawn anew, ids would be near 0.
        again = attempt({name: _shuffled(array, generator) for name, array in runs[-1].items()})
        runs += [] if again is None else [again.feeds]
    return runs


def _telling(feeds: Arrays, files: Sequence[Path]) -> Arrays:
    """Inputs of which two graphs can differ; UsageError where there is no row, or an input without a number."""
    without = [
        name for name, array in feeds.items() if array.dtype.kind == "f" and array.size and not np.isfinite(array).any()
    ]
    if without or not row_count(feeds):
        got = f"{without[0]!r}: NaN and infinity alone" if without else "no row"
        raise UsageError("nothing can be told of these inputs", where=str(files[0]), got=got)
    return feeds


def row_count(feeds: Arrays) -> int:
    """How many samples a set of inputs holds."""
    return max((len(array) for array in feeds.values() if array.ndim), default=1)


def _shuffled(array: Array, generator: np.random.Generator) -> Array:
    return generator.permutation(array.reshape(-1)).reshape(array.shape)


def graph_runner(model: ir.Model) -> RunGraph:
    """Runs a graph as it is written, without the engine's optimisations."""
    program = ModelProgram(model)

    def run(feeds: Arrays) -> Arrays:
        names = list(program.outputs)
        return dict(zip(names, program.run(feeds, names), strict=True))

    return run


def median_seconds(runs: Sequence[RunGraph], feeds: Arrays) -> list[float]:
    """What one run of each takes: the median of several rounds, all in turn, after one run that warms up."""
    sides = {str(number): timed(partial(run, feeds)) for number, run in enumerate(runs)}
    return [median(taken) for taken in interleaved(sides, _ROUNDS).values()]
