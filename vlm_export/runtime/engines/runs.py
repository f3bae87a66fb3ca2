"""Runs of a graph whose floats come and go as float32, whatever the graph's own precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral

import numpy as np

from vlm_export.errors import UsageError
from vlm_export.runtime.engines.onnxruntime import Array, Engine


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`items` in runs of at most `size`; UsageError unless that is a whole number, at least 1."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise UsageError("batch_size must be at least 1", expected="a whole number", got=repr(size))
    return (items[start : start + size] for start in range(0, len(items), size))


def run_in_float32(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A graph's outputs by name; floats go in at each input's own precision, and come out as float32."""
    dtypes = {port.name: port.dtype for port in engine.inputs}
    fitted = {
        name: array.astype(dtypes.get(name), copy=False) if array.dtype.kind == "f" else array
        for name, array in feeds.items()
    }
    return {
        name: array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
        for name, array in engine.run(fitted).items()
    }
