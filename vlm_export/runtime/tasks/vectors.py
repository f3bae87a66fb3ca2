"""Rows of embeddings: checked, of unit length, and as probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.specs.tasks import ScoreSpec


def checked_rows(rows: npt.NDArray[Any], count: int, width: int, output: str) -> FloatArray:
    """A graph's output as float32 (count, width).

    Raises:
        InputError: the graph returned another shape, or values that are not finite.
    """
    if rows.ndim != 2 or len(rows) != count:
        raise InputError("a graph returned no row per input", expected=f"({count}, D)", got=str(rows.shape))
    if rows.shape[1] != width:
        raise InputError(
            "a graph returned embeddings of another width than the manifest states",
            where=output,
            expected=f"({count}, {width})",
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
    shares: FloatArray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def probabilities(cosines: FloatArray, score: ScoreSpec) -> FloatArray:
    """What a score makes of cosines (N, L), float32 (N, L)."""
    # In float32, as the originals compute their logits.
    logits = np.float32(score.scale) * cosines + np.float32(score.logit_bias)
    if score.activation == "softmax":
        return softmax_rows(logits)
    # 1 / (1 + exp(-x)) without overflow.
    half: FloatArray = (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)
    return half
