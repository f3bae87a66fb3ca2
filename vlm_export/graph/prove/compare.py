"""Two outputs compared: to the last bit, or within a tolerance."""

from __future__ import annotations

import numpy as np

from vlm_export.errors import VerificationError
from vlm_export.graph.core.onnxruntime_session import Array


def compare(name: str, expected: Array, got: Array, tolerance: float) -> float:
    """Compares two outputs and returns their largest difference.

    Args:
        tolerance: the allowed difference, times max(1, largest finite absolute value expected); 0: equal to the last
            bit.

    Raises:
        VerificationError: the difference exceeds the tolerance, or kinds, shapes or dtypes differ.
    """
    if equal_values(expected, got):
        return 0.0
    if form_text(expected) != form_text(got):
        raise VerificationError(f"output {name!r} has another form", expected=form_text(expected), got=form_text(got))
    difference, scale = float("inf"), 0.0
    if isinstance(expected, np.ndarray) and expected.dtype.kind in "biuf":
        difference, scale = largest_difference(expected, got)
    bound = tolerance * max(1.0, scale)
    if not (tolerance > 0 and difference <= bound):
        raise VerificationError(
            f"output {name!r} differs",
            expected=f"at most {bound:.3g}" if tolerance else "equal values",
            got=f"a difference of {difference:.3g}",
            fix="a --tolerance allows for rounding",
        )
    return difference


def largest_difference(left: Array, right: Array) -> tuple[float, float]:
    """Returns the largest difference of two arrays of numbers, and the largest finite absolute value of the first.

    NaN equals NaN, and an infinity equals itself; the difference of either to anything else is NaN or infinite.
    """
    left, right = left.astype(np.float64), right.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        difference = float(np.max(np.where(same, 0.0, np.abs(left - right)), initial=0.0))
    return difference, float(np.abs(left[np.isfinite(left)]).max(initial=0.0))


def equal_values(left: Array, right: Array) -> bool:
    """Tells whether two outputs are equal to the last bit; NaN equals NaN. Sequences and maps are compared by entry."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if left.dtype.kind != "f":
            return bool(np.array_equal(left, right))
        nans = np.isnan(left) & np.isnan(right)
        return bool(np.all(nans | ((left == right) & (np.signbit(left) == np.signbit(right)))))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal_values, left, right))
    return type(left) is type(right) and bool(left == right)


def form_text(array: Array) -> str:
    """Returns dtype and shape of an array, or the kind of a sequence or map."""
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__


def says_something(array: Array) -> bool:
    """Tells whether equality with such a result means anything: it has a value, and one that is finite."""
    if not isinstance(array, np.ndarray):
        return True
    return array.size > 0 and (array.dtype.kind not in "fc" or bool(np.isfinite(array).any()))
