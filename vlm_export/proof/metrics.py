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
_PERCENTILE = 0.99


@dataclass(frozen=True)
class Comparison:
    """One output against its reference. Numbers are NaN where shapes differ, and wherever NaN enters them.

    Attributes:
        reference_type, candidate_type: dtype and shape, e.g. "float32 (2, 32)".
        reference_finite, candidate_finite: neither NaN nor infinity occurs.
        max_abs, p99_abs: largest absolute difference, and the smallest that 99 % of the values do not exceed.
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
    p99_abs: float
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
    """Compares two arrays of real numbers or truth values; needs a few blocks and 1 % of the values as extra memory.

    Raises:
        InputError: complex numbers, texts or objects.
    """
    for array in (reference, candidate):
        # Kind V: bfloat16 and others that numpy itself lacks.
        if array.dtype.kind not in "biufV":
            raise InputError("only real numbers can be compared", got=describe_array(array))
    accumulated = _Accumulator(reference.size)
    shape_equal = reference.shape == candidate.shape
    if shape_equal:
        rows = _rows(reference), _rows(candidate)
        scales = _row_scales(rows[0]), _row_scales(rows[1])
        for first_row, left, right in _paired_blocks(*rows):
            accumulated.add(first_row, left, right, scales)
    max_abs, p99_abs = accumulated.differences() if shape_equal else (math.nan, math.nan)
    cosine, smallest, largest = accumulated.rows() if shape_equal else (math.nan, math.nan, math.nan)
    return Comparison(
        reference_type=describe_array(reference),
        candidate_type=describe_array(candidate),
        shape_equal=shape_equal,
        dtype_equal=reference.dtype == candidate.dtype,
        reference_finite=_is_finite(reference),
        candidate_finite=_is_finite(candidate),
        max_abs=max_abs,
        p99_abs=p99_abs,
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
        p99_abs=float(np.max([item.p99_abs for item in items])),
        cosine=float(np.min([item.cosine for item in items])),
        norm_ratio_min=float(np.min([item.norm_ratio_min for item in items])),
        norm_ratio_max=float(np.max([item.norm_ratio_max for item in items])),
        max_reference_abs=float(np.max([item.max_reference_abs for item in items])),
    )


def describe_array(array: Array) -> str:
    """dtype and shape, e.g. "float32 (2, 32)"."""
    return f"{array.dtype} {array.shape}"


class _Accumulator:
    """Sums and extremes of pairs of blocks."""

    def __init__(self, values: int) -> None:
        # The rank from above of the 99th percentile: only that many of the largest differences are kept.
        self._kept = values - math.ceil(_PERCENTILE * values) + 1
        self._largest = np.empty(0)
        self._sums: dict[int, Array] = {}
        # Per row, the power of two of the candidate's scale over the reference's.
        self._scales: dict[int, Array] = {}

    def add(self, first_row: int, left: Array, right: Array, scales: tuple[Array, Array]) -> None:
        """left, right: (rows, columns); rows of one `first_row` may come in several blocks of columns.

        scales: int (all rows,): the powers of two by which the rows of either side are divided before their products.
        """
        self._keep_largest(_differences(left, right).ravel())
        with np.errstate(invalid="ignore", over="ignore"):
            rows = slice(first_row, first_row + len(left))
            left, right = _scaled(left, scales[0][rows]), _scaled(right, scales[1][rows])
            sums = np.stack([(left * right).sum(1), (left * left).sum(1), (right * right).sum(1)])
        self._sums[first_row] = self._sums.get(first_row, 0.0) + sums
        self._scales[first_row] = scales[1][rows] - scales[0][rows]

    def _keep_largest(self, differences: Array) -> None:
        joined = np.concatenate([self._largest, differences])
        if joined.size > self._kept:
            joined = np.partition(joined, joined.size - self._kept)[-self._kept :]  # NaN counts as largest
        self._largest = joined

    def differences(self) -> tuple[float, float]:
        """Largest and 99th percentile of the absolute differences; 0 for empty arrays."""
        if not self._largest.size:
            return 0.0, 0.0
        return float(np.max(self._largest)), float(self._largest.min() if not _has_nan(self._largest) else math.nan)

    def rows(self) -> tuple[float, float, float]:
        """Smallest cosine, smallest and largest ratio of norms over the rows; 1 for empty arrays."""
        if not self._sums:
            return 1.0, 1.0, 1.0
        dot, left, right = np.concatenate(list(self._sums.values()), axis=1)
        left, right = np.sqrt(left), np.sqrt(right)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            cosine, ratio = dot / left / right, np.ldexp(right / left, np.concatenate(list(self._scales.values())))
        both_zero, one_zero = (left == 0) & (right == 0), (left == 0) != (right == 0)
        cosine = np.where(both_zero, 1.0, np.where(one_zero, 0.0, cosine))
        ratio = np.where(both_zero, 1.0, ratio)
        # Rounding may put the cosine of equal rows an ulp above 1.
        return float(np.min(np.minimum(cosine, 1.0))), float(np.min(ratio)), float(np.max(ratio))


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
    for first_row, block, _ in _paired_blocks(rows, rows):
        some = largest[first_row : first_row + len(block)]
        np.maximum(some, np.abs(block).max(1), out=some)
    return np.frexp(np.where(np.isfinite(largest), largest, 0.0))[1]


def _scaled(block: Array, scales: Array) -> Array:
    """The block in float64, divided by two to the power of its rows' scales, which is exact."""
    block = block.astype(np.float64)
    return np.ldexp(block, -scales[:, np.newaxis]) if scales.any() else block


def _has_nan(array: Array) -> bool:
    return bool(np.isnan(array).any())


def _rows(array: Array) -> Array:
    if array.ndim < 2:
        return array.reshape(1, -1)
    return array.reshape(array.shape[0], -1) if array.size else array.reshape(0, 1)


def _paired_blocks(left: Array, right: Array) -> Iterator[tuple[int, Array, Array]]:
    """Pairs of blocks of at most `_BLOCK_VALUES` values, with the index of their first row."""
    rows, columns = left.shape
    if not columns:
        return
    step_rows = max(1, _BLOCK_VALUES // columns)
    for row in range(0, rows, step_rows):
        for column in range(0, columns, _BLOCK_VALUES):
            block = (slice(row, row + step_rows), slice(column, column + _BLOCK_VALUES))
            yield row, left[block], right[block]


def _flat_blocks(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK_VALUES):
        yield flat[start : start + _BLOCK_VALUES]


def _is_finite(array: Array) -> bool:
    return all(bool(np.isfinite(block).all()) for block in _flat_blocks(array))


def _largest(array: Array) -> float:
    return float(np.max([np.abs(block.astype(np.float64)).max() for block in _flat_blocks(array)] or [0.0]))
