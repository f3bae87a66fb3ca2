"""How far one output is from another, relative to its size: the numbers in which noise is measured and judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vlm_export.proof.metrics import Array, json_number, paired_blocks, rows_of

# A row far smaller than the others is measured against them: its own noise comes from what they share.
_SMALLEST_ROW = 1e-2


@dataclass(frozen=True)
class Deviation:
    """One output against another of the same shape; all numbers are ratios, and 0 where the two are equal.

    Attributes:
        row_error: the norm of a row's difference over the row's norm, at its largest (rows: `metrics.rows_of`).
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
    left, right = rows_of(reference), rows_of(candidate)
    squares, errors, products = np.zeros(len(left)), np.zeros(len(left)), 0.0
    largest = largest_difference = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for rows, *pair in paired_blocks(left, right):
            a, b = (block.astype(np.float64) for block in pair)
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
