"""Sizes that only the changed model takes: it is run at them, and several at once must give what each gives alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_export.errors import GraphError, VerificationError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.prove.compare import form_text, largest_difference, says_something
from vlm_export.graph.prove.match_interfaces import InterfaceMatch, Resized
from vlm_export.graph.prove.random_inputs import Run, as_dtype

# Kernels add in another order where there is more to do at once: rounding, times the largest value of an output.
_ROUNDING: Mapping[str, float] = {"float16": 1e-2, "float32": 2e-5, "float64": 1e-12}


@dataclass(frozen=True)
class Compared:
    """What was run.

    Attributes:
        runs: sets of inputs.
        max_abs: largest difference over all outputs.
        shown: outputs that had a finite value that was compared.
        only_run: changes of axes at which nothing could be compared, since the original does not take them and they
            are no batch.
    """

    runs: int = 0
    max_abs: float = 0.0
    shown: frozenset[str] = frozenset()
    only_run: tuple[str, ...] = ()


def run_new_sizes(matched: InterfaceMatch, groups: Sequence[Resized], first: Run, tolerance: float) -> Compared:
    """Runs the changed model at its new sizes, and compares several at once with the original on each alone.

    Args:
        first: a run of the original at the old sizes.

    Raises:
        VerificationError: the changed model cannot be run at a new size, or gives something else for a batch.
    """
    runs, largest, only_run = 0, 0.0, []
    for group in groups:
        others = [other for other in groups if other is not group and isinstance(other.new, int)]
        counts = [size // group.old for size in group.probes() if size % group.old == 0 and size > group.old]
        compared = False
        for count in counts if not others else ():
            difference = _compare(matched, group, _parts(first, group, count), tolerance)
            runs += 1
            compared = difference is not None
            largest = max(largest, difference or 0.0)
        if not counts or others:
            _run_all(matched, first, [group, *others])
            runs += 1
        if not compared:
            only_run.append(str(group))
    shown = {name for name, source in matched.outputs.items() if says_something(first.found[source]) and not only_run}
    return Compared(runs, largest, frozenset(shown), tuple(only_run))


def _parts(run: Run, group: Resized, count: int) -> list[dict[str, Array]]:
    """Feeds of the original that differ in what becomes a batch."""
    rng = np.random.default_rng(7)
    batched = {entry.input for entry in group.axes}
    parts = [dict(run.feeds)]
    for _ in range(count - 1):
        parts.append({name: _other(array, rng) if name in batched else array for name, array in run.feeds.items()})
    return parts


def _other(array: Array, rng: np.random.Generator) -> Array:
    """Other values of the same range."""
    if array.dtype.kind == "f":
        return np.asarray(rng.standard_normal(array.shape).astype(np.float16).astype(array.dtype))
    if array.dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, array.shape).astype(bool))
    if array.dtype.kind in "iu" and array.size:
        return np.asarray(rng.integers(int(array.min()), int(array.max()) + 1, array.shape).astype(array.dtype))
    return np.asarray(np.roll(array, 1))


def _compare(
    matched: InterfaceMatch, group: Resized, parts: Sequence[Mapping[str, Array]], tolerance: float
) -> float | None:
    """The largest difference; None where the axes are no batch, so that nothing says what is right."""
    places = {entry.input: entry.axis for entry in group.axes}
    feeds = {}
    for name, source in matched.inputs.items():
        arrays = [part[source] for part in parts if source in part]
        if arrays:
            feeds[name] = np.concatenate(arrays, places[source]) if source in places else arrays[0]
    results = _run(matched, feeds, group, len(parts))
    wanted = list(matched.outputs.values())
    alone = [matched.before.run(part, wanted) for part in parts]
    is_batch = group.old == 1 and all(entry.axis == 0 for entry in group.axes)
    largest = 0.0
    for number, (name, result) in enumerate(zip(matched.outputs, results, strict=True)):
        difference = _difference(result, [entry[number] for entry in alone], tolerance)
        if difference is None and is_batch:
            raise VerificationError(
                f"output {name!r} of {len(parts)} at once is not what each gives alone",
                where=str(group),
                expected=f"{len(parts)} times {form_text(alone[0][number])}, each equal",
                got=form_text(result),
                fix="the graph mixes what is in a batch, or holds its old size: keep the size, or export the model "
                "again with this axis open",
            )
        if difference is None:
            return None
        largest = max(largest, difference)
    return largest


def _difference(result: Array, alone: Sequence[Array], tolerance: float) -> float | None:
    """How far apart; None where shapes differ, or by more than rounding."""
    if not all(isinstance(array, np.ndarray) for array in (result, *alone)):
        return None
    axes = [axis for axis, pair in enumerate(zip(result.shape, alone[0].shape, strict=False)) if pair[0] != pair[1]]
    if result.ndim != alone[0].ndim or len(axes) > 1:
        return None
    # What does not depend on the batch is there once.
    expected = [alone[0]] if not axes else [np.concatenate(alone, axes[0])]
    expected += list(alone[1:]) if not axes else []
    largest = 0.0
    for array in expected:
        if array.shape != result.shape or array.dtype != result.dtype:
            return None
        if array.dtype.kind not in "f":
            if not np.array_equal(array, result):
                return None
            continue
        difference, scale = largest_difference(array, result)
        if not difference <= max(tolerance * max(1.0, scale), _ROUNDING.get(str(array.dtype), 0.0) * scale):
            return None
        largest = max(largest, difference)
    return largest


def _run_all(matched: InterfaceMatch, run: Run, groups: Sequence[Resized]) -> None:
    """One run with every axis at its new size: parts of the original's feeds, repeated or cut."""
    feeds = {name: run.feeds[source] for name, source in matched.inputs.items() if source in run.feeds}
    names = {source: name for name, source in matched.inputs.items()}
    for group in groups:
        for entry in group.axes:
            array = feeds[names[entry.input]]
            indices = np.arange(group.probes()[0]) % array.shape[entry.axis]
            feeds[names[entry.input]] = np.take(array, indices, entry.axis)
    _run(matched, feeds, groups[0], 1)


def _run(matched: InterfaceMatch, feeds: Mapping[str, Array], group: Resized, count: int) -> list[Array]:
    feeds = {name: as_dtype(array, matched.after.inputs[name]) for name, array in feeds.items()}
    try:
        return matched.after.run(feeds, list(matched.outputs))
    except GraphError as error:
        raise VerificationError(
            "the changed model cannot be run at its new size",
            where=str(group) + (f", at {count * group.old}" if isinstance(group.new, str) else ""),
            got=error.got or error.what,
            fix="keep the size, change the node that is named, or export the model again with this axis open",
        ) from error
