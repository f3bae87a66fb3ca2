"""How far a candidate's output is from the reference's: accumulated in float64, in blocks, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError

Array = npt.NDArray[Any]
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """One output against its reference. Numbers are NaN where shapes differ, and wherever NaN enters them.

    Attributes:
        reference_type, candidate_type: dtype and shape, e.g. "float32 (2, 32)".
        reference_finite, candidate_finite: neither NaN nor infinity occurs.
        max_abs: largest absolute difference.
        cosine: minimum over rows. A row is all that one index of axis 0 holds; an array with fewer than two axes is
            one row. Two zero rows have cosine 1, a zero row and another one 0.
        norm_ratio_min, norm_ratio_max: candidate's norm over reference's, over rows; 1 for two zero rows.
        max_reference_abs: largest absolute value of the reference.
    """

    reference_type: str
    candidate_type: str
    shape_equal: bool
    dtype_equal: bool
    reference_finite: bool
    candidate_finite: bool
    max_abs: float
    cosine: float
    norm_ratio_min: float
    norm_ratio_max: float
    max_reference_abs: float

    @property
    def finite(self) -> bool:
        """Both sides are finite."""
        return self.reference_finite and self.candidate_finite

    def to_json(self) -> dict[str, Any]:
        """The comparison as strict JSON data; NaN and infinities become the strings "nan", "inf" and "-inf"."""
        return {field.name: json_number(getattr(self, field.name)) for field in fields(self)}


def json_number(value: Any) -> Any:
    """The value; as a string that `float` reads back where it is a number that JSON lacks."""
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def compare(reference: Array, candidate: Array) -> Comparison:
    """Compares two arrays of real numbers or truth values; needs a few blocks as extra memory.

    Raises:
        InputError: complex numbers, texts or objects.
    """
    for array in (reference, candidate):
        # Kind V: bfloat16 and others that numpy itself lacks.
        if array.dtype.kind not in "biufV":
            raise InputError("only real numbers can be compared", got=describe_array(array))
    shape_equal = reference.shape == candidate.shape
    numbers = _measured(rows_of(reference), rows_of(candidate)) if shape_equal else (math.nan,) * 4
    max_abs, cosine, smallest, largest = numbers
    return Comparison(
        reference_type=describe_array(reference),
        candidate_type=describe_array(candidate),
        shape_equal=shape_equal,
        dtype_equal=reference.dtype == candidate.dtype,
        reference_finite=_is_finite(reference),
        candidate_finite=_is_finite(candidate),
        max_abs=max_abs,
        cosine=cosine,
        norm_ratio_min=smallest,
        norm_ratio_max=largest,
        max_reference_abs=_largest(reference),
    )


def worst_of(comparisons: Iterable[Comparison]) -> Comparison:
    """Each number's worst value over the comparisons; NaN is worst. The dtype and shape are those of the farthest."""
    items = list(comparisons)
    farthest = max(items, key=lambda item: math.inf if math.isnan(item.max_abs) else item.max_abs)
    return Comparison(
        reference_type=farthest.reference_type,
        candidate_type=farthest.candidate_type,
        shape_equal=all(item.shape_equal for item in items),
        dtype_equal=all(item.dtype_equal for item in items),
        reference_finite=all(item.reference_finite for item in items),
        candidate_finite=all(item.candidate_finite for item in items),
        # np.max and np.min hand NaN on, unlike max and min.
        max_abs=float(np.max([item.max_abs for item in items])),
        cosine=float(np.min([item.cosine for item in items])),
        norm_ratio_min=float(np.min([item.norm_ratio_min for item in items])),
        norm_ratio_max=float(np.max([item.norm_ratio_max for item in items])),
        max_reference_abs=float(np.max([item.max_reference_abs for item in items])),
    )


def describe_array(array: Array) -> str:
    """dtype and shape, e.g. "float32 (2, 32)"."""
    return f"{array.dtype} {array.shape}"


def _measured(left: Array, right: Array) -> tuple[float, float, float, float]:
    """Largest absolute difference, smallest cosine, smallest and largest ratio of norms over the rows.

    Of empty arrays the first is 0, and the others are 1.
    """
    # Powers of two by which the rows are divided before their products.
    scales = _row_scales(left), _row_scales(right)
    sums, max_abs = np.zeros((3, len(left))), 0.0
    for rows, a, b in paired_blocks(left, right):
        # np.maximum hands NaN on, unlike max.
        max_abs = float(np.maximum(max_abs, _differences(a, b).max()))
        with np.errstate(invalid="ignore", over="ignore"):
            a, b = _scaled(a, scales[0][rows]), _scaled(b, scales[1][rows])
            sums[:, rows] += np.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
    if not left.size:
        return max_abs, 1.0, 1.0, 1.0
    norms = np.sqrt(sums[1:])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosine, ratio = sums[0] / norms[0] / norms[1], np.ldexp(norms[1] / norms[0], scales[1] - scales[0])
    zeros = (norms == 0).sum(0)
    cosine = np.where(zeros == 2, 1.0, np.where(zeros == 1, 0.0, cosine))
    ratio = np.where(zeros == 2, 1.0, ratio)
    # Rounding may put the cosine of equal rows an ulp above 1.
    return max_abs, float(np.min(np.minimum(cosine, 1.0))), float(np.min(ratio)), float(np.max(ratio))


def _differences(left: Array, right: Array) -> Array:
    """Absolute differences as float64; of whole numbers of one dtype they are exact before they are rounded to it."""
    if left.dtype == right.dtype and left.dtype.kind in "iu":
        # The larger minus the smaller fits the unsigned numbers of the same width, whose arithmetic wraps around.
        larger, smaller = (pick(left, right).astype(np.uint64) for pick in (np.maximum, np.minimum))
        return (larger - smaller).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(left.astype(np.float64) - right.astype(np.float64))


def _row_scales(rows: Array) -> Array:
    """int32 (rows,): a power of two near each row's largest value, by which squares neither overflow nor vanish.

    Zeros for dtypes whose squares float64 holds.
    """
    if rows.dtype != np.float64:
        return np.zeros(len(rows), np.int32)
    largest = np.zeros(len(rows))
    for some, block, _ in paired_blocks(rows, rows):
        largest[some] = np.maximum(largest[some], np.abs(block).max(1))
    return np.frexp(np.where(np.isfinite(largest), largest, 0.0))[1]


def _scaled(block: Array, scales: Array) -> Array:
    """The block in float64, divided by two to the power of its rows' scales, which is exact."""
    block = block.astype(np.float64)
    return np.ldexp(block, -scales[:, np.newaxis]) if scales.any() else block


def rows_of(array: Array) -> Array:
    """(rows, columns): a row is all that one index of axis 0 holds; an array with fewer than two axes is one row."""
    if array.ndim < 2:
        return array.reshape(1, -1)
    return array.reshape(array.shape[0], -1) if array.size else array.reshape(0, 1)


def paired_blocks(left: Array, right: Array) -> Iterator[tuple[slice, Array, Array]]:
    """Pairs of blocks of at most `_BLOCK_VALUES` values, with their rows; a row may come in several blocks."""
    rows, columns = left.shape
    if not columns:
        return
    step = max(1, _BLOCK_VALUES // columns)
    for row in range(0, rows, step):
        for column in range(0, columns, _BLOCK_VALUES):
            block = (slice(row, min(row + step, rows)), slice(column, column + _BLOCK_VALUES))
            yield block[0], left[block], right[block]


def _flat_blocks(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK_VALUES):
        yield flat[start : start + _BLOCK_VALUES]


def _is_finite(array: Array) -> bool:
    return all(bool(np.isfinite(block).all()) for block in _flat_blocks(array))


def _largest(array: Array) -> float:
    return float(np.max([np.abs(block.astype(np.float64)).max() for block in _flat_blocks(array)] or [0.0]))
