"""How far one output is from another, relative to its size: the numbers in which noise is measured and judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vlm_export.proof.metrics import Array, json_number

_BLOCK_VALUES = 1 << 20
# A row far smaller than the others is measured against them: its own noise comes from what they share.
_SMALLEST_ROW = 1e-2


@dataclass(frozen=True)
class Deviation:
    """One output against another of the same shape; all numbers are ratios, and 0 where the two are equal.

    Attributes:
        row_error: the norm of a row's difference over the row's norm, at its largest. A row is all that one index of
            axis 0 holds; an array with fewer than two axes is one row.
        max_abs: the largest difference over the largest value.
        scale: how far the factor that fits one output to the other best is from 1. Noise is random and cancels in it;
            a wrong scale does not.
    """

    row_error: float
    max_abs: float
    scale: float

    def to_json(self) -> dict[str, Any]:
        return {name: json_number(value) for name, value in asdict(self).items()}


def measure_deviation(reference: Array, candidate: Array) -> Deviation:
    """The deviation of `candidate` from `reference`; accumulated in float64, in blocks.

    Numbers are NaN where a value is not finite, and where the shapes differ.
    """
    if reference.shape != candidate.shape:
        return Deviation(math.nan, math.nan, math.nan)
    left, right = _rows(reference), _rows(candidate)
    squares, errors, products = np.zeros(len(left)), np.zeros(len(left)), 0.0
    largest = largest_difference = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for rows, a, b in _blocks(left, right):
            difference = b - a
            squares[rows] += (a * a).sum(axis=1)
            errors[rows] += (difference * difference).sum(axis=1)
            products += float((a * difference).sum())
            # np.maximum hands NaN on, unlike max.
            largest = float(np.maximum(largest, np.abs(a).max()))
            largest_difference = float(np.maximum(largest_difference, np.abs(difference).max()))
        norms = np.sqrt(squares)
        floor = _SMALLEST_ROW * math.sqrt(squares.sum() / max(len(norms), 1))
        ratios = [_ratio(error, norm) for error, norm in zip(np.sqrt(errors), np.maximum(norms, floor), strict=True)]
        row_error = float(np.max([0.0, *ratios]))
        scale = abs(_ratio(products, float(squares.sum())))
    return Deviation(row_error, _ratio(largest_difference, largest), scale)


def worst_deviation(deviations: Iterable[Deviation]) -> Deviation:
    """Each number's largest value; NaN is largest."""
    items = list(deviations)
    return Deviation(**{f.name: float(np.max([getattr(item, f.name) for item in items])) for f in fields(Deviation)})


def worst_by_output(points: Iterable[Mapping[str, Deviation]]) -> dict[str, Deviation]:
    """Output name → each number's largest value over the points that have the output."""
    found: dict[str, list[Deviation]] = {}
    for point in points:
        for name, deviation in point.items():
            found.setdefault(name, []).append(deviation)
    return {name: worst_deviation(items) for name, items in found.items()}


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return float(part / whole)


def _rows(array: Array) -> Array:
    if array.ndim < 2:
        return array.reshape(1, -1)
    return array.reshape(array.shape[0], -1) if array.size else array.reshape(0, 1)


def _blocks(left: Array, right: Array) -> Iterator[tuple[slice, Array, Array]]:
    rows, columns = left.shape
    if not columns:
        return
    step = max(1, _BLOCK_VALUES // columns)
    for row in range(0, rows, step):
        for column in range(0, columns, _BLOCK_VALUES):
            block = (slice(row, min(row + step, rows)), slice(column, column + _BLOCK_VALUES))
            yield block[0], left[block].astype(np.float64), right[block].astype(np.float64)
