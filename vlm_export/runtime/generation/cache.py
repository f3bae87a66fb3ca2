"""A decoder's keys and values as arrays: their names in graphs, the empty cache, and rows taken from it."""

from __future__ import annotations

import numpy as np

from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import Array, TensorInfo
from vlm_export.runtime.generation.options import IdArray

PAST, PRESENT = "past_key_values.", "present."


def present_name(past: str) -> str:
    """The output that is the next step's input `past`."""
    return PRESENT + past.removeprefix(PAST)


def no_tokens(info: TensorInfo, rows: int) -> Array:
    """An empty cache (rows, H, 0, d); InputError when the graph's heads have no fixed number or width."""
    heads, width = (info.shape[1], info.shape[3]) if len(info.shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise InputError(f"the cache {info.name!r} has no fixed heads", got=str(info.shape), fix="export again")
    return np.zeros((rows, heads, 0, width), info.dtype)


def taken_rows(array: Array, rows: IdArray) -> Array:
    """`array[rows]`; where the rows are neighbours in order, a view instead of a copy."""
    first = int(rows[0]) if len(rows) else 0
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        return array[first : first + len(rows)]
    return array[rows]
