"""Quantised weights against the float32 weights of the same bundle: each is within half a step.

A digest tells that a file is the one that was published. This tells that what was published is the model: the float32
graph is proved against the checkpoint, and a quantised weight against the float32 graph's. Without torch and onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from vlm_export.bundle.initializers import StoredValues, required, stored_initializers
from vlm_export.bundle.ledger import GraphLedger, LedgerEntry, read_ledger, summary
from vlm_export.bundle.manifest import PRECISIONS, PartRecord, VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.quantised import TRANSPOSED, QuantisedFrom
from vlm_export.errors import VerificationError
from vlm_export.proof.metrics import Array

NOT_COMPARED = "quantised weights with the float32 ones: the part has no float32 graph, or the bundle no ledger"
_HALF = 0.5
# Levels are computed in float32, so that a value in the middle of two may be put on either.
_ROUNDING = 1e-3
# The end of the range: what lies beyond by up to a step is cut, as symmetric quantisation of 4 bits does.
_AT_END = 1.0
_BLOCK_VALUES = 1 << 22
# What a quantiser adds to a graph beside its weights has at most so many values.
_FEW = 16
_FLOAT = 1
_SIGNED, _UNSIGNED, _SIGNED4, _UNSIGNED4, _SIGNED32 = 3, 2, 22, 21, 6
_DTYPES: Mapping[int, npt.DTypeLike] = {
    **{_FLOAT: np.float32, _SIGNED: np.int8, _UNSIGNED: np.uint8},
    _SIGNED32: np.int32,
}


@dataclass(frozen=True)
class _Levels:
    """Some rows of a weight: levels, what a step is worth, which level is zero; all of one shape, or made so."""

    levels: Array
    scales: Array
    zeros: Array
    lowest: int
    highest: int


def check_quantised_weights(bundle: OpenBundle, part: PartRecord, variant: VariantRecord) -> tuple[str, ...]:
    """Every weight that the ledger calls quantised is the float32 graph's, within half a step.

    Returns:
        What could not be checked, for the report; nothing for a variant that is not quantised.

    Raises:
        VerificationError: names the weights that are not.
        InputError: a graph lacks what its ledger names.
    """
    if variant.loss is None:
        return ()
    ledger = (read_ledger(bundle) or {}).get(variant.file)
    float32 = next((one for one in part.variants if one.precision == PRECISIONS[0]), None)
    if ledger is None or float32 is None:
        return (NOT_COMPARED,)
    bundle.model_files(float32)
    bundle.model_files(variant)
    ours, theirs = stored_initializers(bundle.root, variant.file), stored_initializers(bundle.root, float32.file)
    problems = [text for text in _problems(ledger, ours, theirs) if text]
    if problems:
        raise VerificationError(
            f"{len(problems)} quantised weights of part {part.name!r} are not those of its float32 graph",
            where=variant.file,
            expected="every weight within half a step of the float32 weight",
            got=summary(problems),
            fix="do not use this variant; quantize the bundle again",
        )
    return ()


def _problems(
    ledger: GraphLedger, ours: dict[str, StoredValues], theirs: dict[str, StoredValues]
) -> Iterator[str | None]:
    # What is no weight in fewer bits must be the float32 graph's, to the bit, whatever the ledger says that it is made
    # of; or something that a weight needs, or that the quantiser put there.
    helpers = {name for entry in ledger.initializers for name in _helpers(entry.quantised)}
    for entry in ledger.initializers:
        factors = _factors(entry.smoothed_by, ledger.file, ours, theirs)
        if factors is None:
            yield f"{entry.name} is smoothed by something else than powers of two"
        elif entry.quantised is not None:
            yield _farthest(entry, entry.quantised, factors, ledger.file, ours, theirs)
        elif entry.name not in helpers:
            yield _same(entry, factors, ledger.file, ours, theirs)


def _factors(
    norm: str | None, graph: str, ours: dict[str, StoredValues], theirs: dict[str, StoredValues]
) -> Array | None:
    """What smoothing divided a norm's channels by, float32 (C,), or one for all; None where that is no power of two."""
    if norm is None:
        return np.ones(1, np.float32)
    left, right = required(ours, norm, graph), required(theirs, norm, graph)
    if left.shape != right.shape or len(left.shape) != 1 or {left.data_type, right.data_type} != {_FLOAT}:
        return None
    here, there = _array(left), _array(right)
    zeros = (here == 0) & (there == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(zeros, np.float32(1), there / here)
    mantissas, _ = np.frexp(found)
    return found if np.all(np.isfinite(found) & (mantissas == _HALF)) else None


def _helpers(stated: QuantisedFrom | None) -> Sequence[str]:
    return () if stated is None else [name for name in (stated.scales, stated.zero_points) if name is not None]


def _same(
    entry: LedgerEntry, factors: Array, graph: str, ours: dict[str, StoredValues], theirs: dict[str, StoredValues]
) -> str | None:
    source = entry.name if entry.name in theirs else entry.name.removesuffix(TRANSPOSED)
    if source not in theirs:
        # Steps and zeros of activations are single numbers.
        return None if prod(entry.shape) <= _FEW else f"{entry.name} is no weight of the float32 graph"
    left, right = required(ours, entry.name, graph), theirs[source]
    if source == entry.name and entry.smoothed_by is None:
        if left.shape != right.shape or left.data_type != right.data_type:
            return f"{entry.name} has another type or shape"
        equal = np.array_equal(_bytes(left), _bytes(right))
    else:
        equal = {left.data_type, right.data_type} == {_FLOAT} and _is_form(left, right, source != entry.name, factors)
    return None if equal else f"{entry.name} is not the float32 graph's"


def _is_form(left: StoredValues, right: StoredValues, transposed: bool, factors: Array) -> bool:
    """Whether a float32 norm was divided by the factors, or a matrix's rows multiplied, which rounds nothing."""
    wanted = _array(right).reshape(right.shape)
    if transposed:
        wanted = wanted.T
    if left.shape != wanted.shape or len(factors) not in (1, len(wanted)):
        return False
    scale = factors[:, None] if wanted.ndim > 1 else 1 / factors
    return np.array_equal(_array(left).reshape(left.shape), wanted * scale)


def _farthest(
    entry: LedgerEntry,
    stated: QuantisedFrom,
    factors: Array,
    graph: str,
    ours: dict[str, StoredValues],
    theirs: dict[str, StoredValues],
) -> str | None:
    """What is wrong with one weight, or nothing; factors: of its rows, or one for all."""
    levels, scales = required(ours, entry.name, graph), required(ours, stated.scales, graph)
    zeros = None if stated.zero_points is None else required(ours, stated.zero_points, graph)
    source = required(theirs, stated.weight, graph)
    weight = np.memmap(source.path, np.float32, "r", source.offset, source.shape)
    expected = weight.T if stated.transposed else weight
    if len(factors) not in (1, len(expected)):
        return f"{entry.name} is not a form of {stated.weight}"
    factors = factors.reshape(-1, *[1] * (expected.ndim - 1))
    worst, count = 0.0, 0
    for start, end in _row_blocks(expected.shape, stated):
        found = _levels(stated, levels, scales, zeros, (start, end), expected.shape)
        if stated.layout == "product-blocks":
            rows = (expected[:, start:end] * factors).T
        else:
            rows = expected[start:end] * (factors[start:end] if len(factors) > 1 else factors)
        if found is None or found.levels.shape != rows.shape:
            return f"{entry.name} is not a form of {stated.weight}"
        steps = np.abs((rows.astype(np.float64) / found.scales) - (found.levels.astype(np.float64) - found.zeros))
        at_end = (found.levels == found.lowest) | (found.levels == found.highest)
        allowed = np.where(at_end, _AT_END, _HALF) + _ROUNDING
        with np.errstate(invalid="ignore"):
            wrong = ~(steps <= allowed)
        if wrong.any():
            count += int(wrong.sum())
            worst = max(worst, float(np.nan_to_num(steps[wrong], nan=np.inf).max()))
    if not count:
        return None
    return f"{entry.name} (made of {stated.weight}): {count} values are up to {worst:.3g} steps away"


def _row_blocks(shape: Sequence[int], stated: QuantisedFrom) -> Iterator[tuple[int, int]]:
    """Ranges of rows, or of columns where a column is what is stored as a row."""
    count = shape[1] if stated.layout == "product-blocks" else shape[0]
    step = max(1, _BLOCK_VALUES // max(1, prod(shape) // max(1, count)))
    yield from ((start, min(start + step, count)) for start in range(0, count, step))


def _levels(
    stated: QuantisedFrom,
    levels: StoredValues,
    scales: StoredValues,
    zeros: StoredValues | None,
    rows: tuple[int, int],
    shape: Sequence[int],
) -> _Levels | None:
    if stated.layout == "channels":
        return _channel_levels(stated, levels, scales, zeros, slice(*rows))
    return _block_levels(stated, levels, scales, zeros, slice(*rows), shape)


def _channel_levels(
    stated: QuantisedFrom, levels: StoredValues, scales: StoredValues, zeros: StoredValues | None, rows: slice
) -> _Levels | None:
    if levels.data_type not in (_SIGNED, _UNSIGNED, _SIGNED32):
        return None
    every = _array(levels).reshape(levels.shape)
    shape = [1] * every.ndim
    steps = _array(scales).reshape(-1)
    zero = np.zeros(1, every.dtype) if zeros is None else _array(zeros).reshape(-1)
    if stated.axis is not None:
        shape[stated.axis] = every.shape[stated.axis]
        if steps.size != shape[stated.axis] or zero.size not in (1, steps.size):
            return None
    wide: Array = steps.reshape(shape)
    zeros_wide: Array = zero.reshape(shape if zero.size > 1 else [1] * every.ndim)
    if stated.axis == 0:
        wide, zeros_wide = wide[rows], zeros_wide[rows] if zero.size > 1 else zeros_wide
    bounds = np.iinfo(every.dtype)
    # Symmetric levels of 8 bits leave one out.
    lowest = -bounds.max if levels.data_type != _UNSIGNED else bounds.min
    return _Levels(every[rows], wide, zeros_wide.astype(np.float64), int(lowest), int(bounds.max))


def _block_levels(
    stated: QuantisedFrom,
    levels: StoredValues,
    scales: StoredValues,
    zeros: StoredValues | None,
    rows: slice,
    shape: Sequence[int],
) -> _Levels | None:
    size, bits = stated.block_size, stated.bits
    if size is None or levels.data_type not in (_UNSIGNED, _UNSIGNED4, _SIGNED4):
        return None
    is_product = stated.layout == "product-blocks"
    outputs, inner = (shape[1], shape[0]) if is_product else (shape[0], shape[1])
    blocks = -(-inner // size)
    per_row = blocks * size * bits // 8 if is_product else inner * bits // 8
    if levels.length != outputs * per_row or scales.length != 4 * outputs * blocks:
        return None
    packed = _bytes(levels).reshape(outputs, per_row)[rows]
    values = _unpacked(packed, bits)[:, :inner]
    steps = _array(scales).reshape(outputs, blocks)[rows]
    middle = 1 << (bits - 1)
    if zeros is None:
        zero = np.full(steps.shape, middle if levels.data_type == _UNSIGNED else 0, np.float64)
    else:
        zero = _zero_points(zeros, outputs, blocks, bits, padded=is_product)[rows].astype(np.float64)
    if levels.data_type == _SIGNED4:
        values = np.where(values >= middle, values.astype(np.int16) - 2 * middle, values)
    low = -middle if levels.data_type == _SIGNED4 else 0
    wide = np.repeat(steps, size, axis=1)[:, :inner], np.repeat(zero, size, axis=1)[:, :inner]
    return _Levels(values, *wide, lowest=low, highest=low + 2 * middle - 1)


def _zero_points(zeros: StoredValues, outputs: int, blocks: int, bits: int, *, padded: bool) -> Array:
    """(outputs, blocks): of products each row begins with a byte of its own."""
    raw = _bytes(zeros)
    if padded:
        return _unpacked(raw.reshape(outputs, -1), bits)[:, :blocks]
    return _unpacked(raw.reshape(1, -1), bits)[0, : outputs * blocks].reshape(outputs, blocks)


def _unpacked(rows: Array, bits: int) -> Array:
    """Values of 8 bits, or of 4: the lower half of a byte comes first."""
    if bits == 8:
        return rows
    values = np.empty((len(rows), 2 * rows.shape[1]), np.uint8)
    values[:, 0::2], values[:, 1::2] = rows & 15, rows >> 4
    return values


def _array(values: StoredValues) -> Array:
    return _bytes(values).view(_DTYPES[values.data_type])


def _bytes(values: StoredValues) -> Array:
    return np.memmap(values.path, np.uint8, "r", values.offset, (values.length,))
