"""The points at which an exported part is compared: axis sizes and seeds, never the tracing example alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import numpy as np

from vlm_export.specs.signature import Axis, Signature

BATCH_AXIS = "batch"
BATCHES = (1, 2, 3, 5)
SEEDS = (0, 1, 2)
# What the runtime and the command line feed by default: tiles, slices and captions 4, questions 8, images 16,
# `embed` and answers to rank 32, texts 64.
RUNTIME_BATCHES = (4, 8, 16, 32, 64)
SEQUENCE_AXIS = "sequence"
# Lengths that texts have, and those that the cache of a decoder has while it writes one.
LENGTH_AXES = (SEQUENCE_AXIS, "past_sequence")
# A range of lengths up to this is tried whole; of a longer one its first, and some of those behind.
_WHOLE_LENGTHS, _FIRST_LENGTHS, _DRAWN_LENGTHS = 128, 64, 12
# A length that is drawn stays below this: what a long one costs grows with its square.
LONGEST_DRAWN = 512
_DRAW_SEED = 20
# Stands for the upper end of an axis that has none: odd, and past the sizes that kernels special-case.
_UNBOUNDED_SPAN = 65
# What one score of cached attention takes: in float32 made, masked, exponentiated and divided.
_SCORE_BYTES = 16
# Of attention between patches, which knows no mask: made and divided.
_PATCH_SCORE_BYTES = 8


@dataclass(frozen=True)
class GridPoint:
    """The size of every axis, and the seed of the example inputs."""

    sizes: Mapping[str, int]
    seed: int

    @property
    def rows(self) -> int:
        """What the point costs: its batch size."""
        return self.sizes.get(BATCH_AXIS, 1)


@dataclass(frozen=True)
class Attention:
    """The most heads of a layer, and what the scores of one layer may take in bytes."""

    heads: int
    budget_bytes: int


def grid_for(
    signature: Signature,
    *,
    seeds: Sequence[int] = SEEDS,
    budget_rows: int | None = None,
    budget_bytes: int | None = None,
    attention: Attention | None = None,
) -> tuple[GridPoint, ...]:
    """The points for a signature; the same arguments give the same points.

    Every size of every axis appears at least once, and both ends of each pair of axes in all four combinations, but
    for axes that others bound. The seeds alternate, and each appears.

    Args:
        budget_rows: bound of the total of batch rows, for large models: first the combinations of ends are left out,
            then the large batches. Batches 1 and 2 and all sizes of the other axes stay, whatever they cost.
        budget_bytes: bound of one point's inputs and outputs: where they take more, the longest axis is halved until
            they fit, the batch last. A decoder's logits or cache at a context of thousands of tokens take gigabytes.
            So are the scores of attention, which grow with the square of the context or of the number of patches.
        attention: bounds them apart from the arrays, for all heads of a layer; None: one head's, by `budget_bytes`.
    """
    points: tuple[GridPoint, ...] = ()
    for batches, pairs in ((BATCHES, True), (BATCHES, False), (BATCHES[:3], False), (BATCHES[:2], False)):
        combined = _combined(signature, batches, pairs)
        sizes = [_within_bytes(signature, point, budget_bytes, attention) for point in combined]
        points = _seeded(_distinct(sizes), seeds)
        if budget_rows is None or sum(point.rows for point in points) <= budget_rows:
            break
    return points


def runtime_points(
    signature: Signature,
    batches: Sequence[int] = RUNTIME_BATCHES,
    *,
    every_length: bool = True,
    longest: int = LONGEST_DRAWN,
    budget_bytes: int | None = None,
    attention: Attention | None = None,
) -> tuple[GridPoint, ...]:
    """The points that deployments run, beside those of `grid_for`: large batches of short rows, and lengths of texts.

    A graph may be right at the ends of an axis and wrong at one size in between. The seeds alternate.

    Args:
        batches: the sizes of batches.
        every_length: tries each length of a text, one row at a time; otherwise a few that are drawn, the same on
            every call.
        longest: no length that is drawn is above it.
        budget_bytes, attention: as for `grid_for`; a batch that does not fit is left out.
    """
    free = _free_axes(signature)
    short = {axis.name: axis_sizes(axis, BATCHES[:1])[:2][-1] for axis in free}
    found: list[dict[str, int]] = []
    for axis in free:
        if axis.name == BATCH_AXIS:
            upper = max(batches, default=0) if axis.maximum is None else axis.maximum
            sizes = [{**short, BATCH_AXIS: size} for size in batches if axis.minimum <= size <= upper]
            related = [_related(signature, point) for point in sizes]
            found += [point for point in related if _fits(signature, point, budget_bytes, attention)]
        elif axis.name in LENGTH_AXES:
            least = {other.name: other.minimum for other in free if other.name in LENGTH_AXES}
            for length in _lengths(axis, every_length, longest):
                found.append(_related(signature, {**short, **least, axis.name: length}))
    return tuple(GridPoint(sizes, SEEDS[i % len(SEEDS)]) for i, sizes in enumerate(_distinct(found)))


def _lengths(axis: Axis, every: bool, longest: int) -> Sequence[int]:
    """All lengths of a short range, or the first and a draw from the others; without `every` the draw alone."""
    low, high = axis.minimum, axis.minimum + _UNBOUNDED_SPAN if axis.maximum is None else axis.maximum
    if every and high - low < _WHOLE_LENGTHS:
        return range(low, high + 1)
    first = min(low + _FIRST_LENGTHS, high) if every else low
    drawn_from = np.arange(first, min(high, max(longest, first)) + 1)
    drawn = np.random.default_rng(_DRAW_SEED).permutation(drawn_from)[:_DRAWN_LENGTHS]
    return (*range(low, first), *sorted(int(length) for length in drawn))


def least_grid(signature: Signature, seed: int = SEEDS[0]) -> tuple[GridPoint, ...]:
    """The fewest points that show every axis to be one, for models that take minutes at each.

    Both ends and a middle size of each axis, equal axes at different ones; a batch of 2 where a row is neither the
    smallest nor the largest, and of 1 elsewhere.
    """
    others = {axis.name: _least_sizes(axis) for axis in _free_axes(signature) if axis.name != BATCH_AXIS}
    points = sorted(_walked(others), key=lambda sizes: prod(sizes.values()))
    batches = [size for axis in signature.axes if axis.name == BATCH_AXIS for size in axis_sizes(axis, BATCHES[:2])]
    if batches:
        middle = (len(points) - 1) // 2
        rows = [batches[-1] if i == middle else batches[0] for i in range(len(points))]
        points = [{BATCH_AXIS: count, **sizes} for count, sizes in zip(rows, points, strict=True)]
        if len(points) == 1 and len(batches) > 1:
            points = [{**points[0], BATCH_AXIS: batches[0]}, *points]
    found = [_related(signature, sizes) for sizes in points]
    return tuple(GridPoint(sizes, seed) for i, sizes in enumerate(found) if sizes not in found[:i])


def left_out(signature: Signature, points: Sequence[GridPoint]) -> str:
    """What the points lack of the whole grid, e.g. "5 of 8 grid points (batch 3, 5; seed 1, 2)"; "" for nothing."""
    whole = grid_for(signature)
    ran = [point.sizes for point in points]
    # Points may have been dropped, or made smaller.
    missing = max(len(whole) - len(points), sum(point.sizes not in ran for point in whole))
    if missing <= 0:
        return ""
    axes = [
        (axis.name, {point.sizes[axis.name] for point in whole} - {point.sizes[axis.name] for point in points})
        for axis in _free_axes(signature)
    ]
    axes.append(("seed", {point.seed for point in whole} - {point.seed for point in points}))
    values = "; ".join(f"{name} {', '.join(map(str, sorted(sizes)))}" for name, sizes in axes if sizes)
    return f"{missing} of {len(whole)} grid points ({values or 'combinations of sizes'})"


def batches_left_out(signature: Signature, points: Sequence[GridPoint]) -> tuple[int, ...]:
    """Those of RUNTIME_BATCHES that the signature takes and no point has."""
    ran = {point.sizes.get(BATCH_AXIS) for point in points}
    axes = [axis for axis in _free_axes(signature) if axis.name == BATCH_AXIS]
    return tuple(
        size
        for axis in axes
        for size in RUNTIME_BATCHES
        if axis.minimum <= size and (axis.maximum is None or size <= axis.maximum) and size not in ran
    )


def axis_sizes(axis: Axis, batches: Sequence[int] = BATCHES) -> tuple[int, ...]:
    """The sizes at which an axis is tried: `batches` in its range, or its ends and odd sizes between."""
    if axis.multiple_of > 1:
        step = axis.multiple_of
        steps = Axis(axis.name, axis.minimum // step, None if axis.maximum is None else axis.maximum // step)
        return tuple(size * step for size in axis_sizes(steps, batches))
    low = axis.minimum
    high = axis.maximum if axis.maximum is not None else low + _UNBOUNDED_SPAN
    if axis.name == BATCH_AXIS:
        within = tuple(size for size in batches if low <= size <= high)
        return within or tuple(sorted({low, high}))
    inner = (low + 2, low + (high - low) // 2)
    odd = {size if size % 2 else size + 1 for size in inner}
    return tuple(sorted({low, high} | {size for size in odd if low < size < high}))


def _combined(signature: Signature, batches: Sequence[int], pairs: bool) -> list[dict[str, int]]:
    sizes = {axis.name: axis_sizes(axis, batches) for axis in _free_axes(signature)}
    found = _walked(sizes)
    # An axis that another bounds has its ends already: with each of the others they would cost more than they show.
    paired = [axis.name for axis in _free_axes(signature) if axis.at_most is None]
    for left, right in combinations(paired, 2) if pairs else ():
        middle = {name: values[len(values) // 2] for name, values in sizes.items()}
        for ends in product((sizes[left][0], sizes[left][-1]), (sizes[right][0], sizes[right][-1])):
            found.append({**middle, left: ends[0], right: ends[1]})
    return _distinct([_related(signature, point) for point in found])


def _distinct(points: list[dict[str, int]]) -> list[dict[str, int]]:
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _free_axes(signature: Signature) -> list[Axis]:
    """Those that are no sum of others."""
    return [axis for axis in signature.axes if not axis.sum_of]


def _walked(sizes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """As many points as the longest axis has sizes, each axis at each of its own."""
    count = max(map(len, sizes.values()), default=1)
    # The modulus walks short axes repeatedly along the longest one, the offset keeps equal ones out of step.
    return [
        {name: values[(i + shift) % len(values)] for shift, (name, values) in enumerate(sizes.items())}
        for i in range(count)
    ]


def _least_sizes(axis: Axis) -> tuple[int, ...]:
    """Both ends and the largest of the sizes between."""
    sizes = axis_sizes(axis)
    return tuple(dict.fromkeys((sizes[0], *sizes[-2:])))


def _related(signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes as the axes' relations have them; where a sum exceeds its range, its first term gives way."""
    sizes = dict(sizes)
    for axis in signature.axes:
        total = sum(sizes[term] for term in axis.sum_of)
        if axis.sum_of and axis.maximum is not None and total > axis.maximum:
            sizes[axis.sum_of[0]] -= total - axis.maximum
    return signature.related(sizes)


def point_bytes(signature: Signature, sizes: Mapping[str, int]) -> int:
    """What the inputs and outputs take together; axes without a size, which only outputs have, count as 1."""
    known = {axis.name: sizes.get(axis.name, 1) for axis in signature.axes}
    tensors = (*signature.inputs, *signature.outputs)
    return sum(prod(t.concrete_shape(known)) * np.dtype(t.dtype).itemsize for t in tensors)


def _scores_bytes(signature: Signature, sizes: Mapping[str, int]) -> int:
    """What one head's scores take: of new tokens and cached ones, or of an image's patches; 0 for other parts."""
    rows = sizes.get(BATCH_AXIS, 1)
    cached = (sizes[axis.sum_of[-1]] * sizes[axis.name] for axis in signature.axes if axis.sum_of)
    patches = _patches(signature, sizes)
    return rows * max(_SCORE_BYTES * max(cached, default=0), _PATCH_SCORE_BYTES * patches * patches)


def _patches(signature: Signature, sizes: Mapping[str, int]) -> int:
    """How many patches an image of these sizes has, 0 where no axis goes in steps of a patch."""
    steps = {axis.name: axis.multiple_of for axis in signature.axes if axis.multiple_of > 1}
    counts = [
        prod(sizes[entry] // steps[entry] for entry in tensor.shape if isinstance(entry, str) and entry in steps)
        for tensor in signature.inputs
        if steps.keys() & set(tensor.shape)
    ]
    return max(counts, default=0)


def _fits(
    signature: Signature, sizes: Mapping[str, int], budget_bytes: int | None, attention: Attention | None
) -> bool:
    """Whether neither the arrays nor the scores of attention take more."""
    if attention is None:
        attention = None if budget_bytes is None else Attention(1, budget_bytes)
    if attention is not None and attention.heads * _scores_bytes(signature, sizes) > attention.budget_bytes:
        return False
    return budget_bytes is None or point_bytes(signature, sizes) <= budget_bytes


def _within_bytes(
    signature: Signature, sizes: dict[str, int], budget_bytes: int | None, attention: Attention | None
) -> dict[str, int]:
    """The sizes, with the longest axis halved until the arrays fit; where they never do, the smallest sizes."""
    while not _fits(signature, sizes, budget_bytes, attention):
        halves = {axis.name: _half(axis, sizes[axis.name]) for axis in signature.axes if not axis.sum_of}
        shorter = {name: size for name, size in halves.items() if size < sizes[name]}
        if not shorter:
            break
        longest = max(shorter, key=lambda name: (name != BATCH_AXIS, sizes[name]))
        sizes = signature.related({**sizes, longest: shorter[longest]})
    return sizes


def _half(axis: Axis, size: int) -> int:
    return max(size // 2 // axis.multiple_of * axis.multiple_of, axis.minimum)


def _seeded(combinations_: list[dict[str, int]], seeds: Sequence[int]) -> tuple[GridPoint, ...]:
    # Fewer points than seeds: the points come again, so that each seed appears.
    count = max(len(combinations_), len(seeds))
    return tuple(GridPoint(combinations_[i % len(combinations_)], seeds[i % len(seeds)]) for i in range(count))
