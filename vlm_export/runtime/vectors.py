"""Batches of inputs to rows of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engine import Array, Engine
from vlm_export.runtime.image import FloatArray

MASK_NAME = "attention_mask"


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`items` in runs of at most `size`; UsageError unless that is a whole number, at least 1."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise UsageError("batch_size must be at least 1", expected="a whole number", got=repr(size))
    return (items[start : start + size] for start in range(0, len(items), size))


def takes_mask(engine: Engine) -> bool:
    """Whether the graph is told which tokens are padding."""
    return any(port.name == MASK_NAME for port in engine.inputs)


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


def run_encoder(
    engine: Engine, batch: npt.NDArray[Any], mask: npt.NDArray[Any] | None = None, *, width: int
) -> FloatArray:
    """The first output of a graph that takes `batch` first, as float32 (B, D).

    Args:
        mask: for graphs that take an `attention_mask`; the others get none.
        width: D as the manifest states it.

    Raises:
        InputError: the graph returns another shape, or values that are not finite.
    """
    feeds: dict[str, Array] = {engine.inputs[0].name: batch}
    if mask is not None and takes_mask(engine):
        feeds[MASK_NAME] = mask
    rows: FloatArray = run_in_float32(engine, feeds)[engine.outputs[0].name]
    if rows.ndim != 2 or len(rows) != len(batch):
        raise InputError("a graph returned no row per input", expected=f"({len(batch)}, D)", got=str(rows.shape))
    if rows.shape[1] != width:
        raise InputError(
            "a graph returned embeddings of another width than the manifest states",
            where=engine.outputs[0].name,
            expected=f"({len(batch)}, {width})",
            got=str(rows.shape),
            fix="copy the bundle again, or export it again with --overwrite",
        )
    if not np.isfinite(rows).all():
        raise InputError(
            "a graph returned values that are not finite",
            expected="finite embeddings",
            got=f"{int((~np.isfinite(rows)).any(axis=1).sum())} of {len(rows)} rows with NaN or infinity",
            fix="use the fp32 variant, or verify the bundle on this machine",
        )
    return rows


def unit_rows(rows: FloatArray) -> FloatArray:
    """Rows divided by their lengths, which are summed in float64; a row of zeros stays zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: FloatArray = (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return unit


def softmax_rows(logits: npt.NDArray[Any]) -> FloatArray:
    """Softmax along the second axis, computed in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: FloatArray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities
