"""Values as another dtype holds them, so that two models of different dtypes are fed the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.numpy_dtypes import is_plain_number
from vlm_export.graph.core.onnxruntime_session import Array


def as_dtype(array: Array, value: ir.Value | None) -> Array:
    """The values as that tensor's dtype holds them; programs take and give as float32 what numpy lacks."""
    if value is None or value.dtype is None or not isinstance(array, np.ndarray) or not is_plain_number(array.dtype):
        return array
    wanted = value.dtype.numpy()
    if array.dtype == wanted:
        return array
    with np.errstate(invalid="ignore", over="ignore"):
        held = array.astype(wanted)
    return np.asarray(held if is_plain_number(wanted) else held.astype(np.float32))


def bounds_of(dtype: ir.DataType) -> tuple[float, float]:
    """The smallest and the largest finite number of an integer or floating point dtype."""
    return float(dtype.min), float(dtype.max)


def held_by_both(array: Array, old: ir.Value, new: ir.Value | None) -> Array:
    """Values of the old dtype that the new one holds exactly: clipped to its range, and rounded as it rounds.

    Args:
        array: of the old dtype or of the new one.
        old: a tensor of the dtype to return.
        new: a tensor of the other dtype; None where dtypes do not differ.
    """
    if new is None or new.dtype is None or old.dtype is None or new.dtype == old.dtype:
        return array
    if not isinstance(array, np.ndarray) or not is_plain_number(array.dtype):
        return array
    if new.dtype.is_integer() or new.dtype.is_floating_point():
        low, high = bounds_of(new.dtype)
        if array.dtype.kind == "f" or array.astype(np.float64).max(initial=0.0) > high:
            array = np.clip(array.astype(np.float64), low, high)
    rounded = as_dtype(array, new)
    return as_dtype(rounded, old)
