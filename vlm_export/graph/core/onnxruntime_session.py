"""Graphs run in ONNX Runtime as they are written: one thread, and none of its optimisations unless asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto

from vlm_export import interrupts

Array: TypeAlias = npt.NDArray[Any]

# Tensor types that come back as they are. Narrower ones come back as raw bytes under another dtype, or not at all.
_NUMPY_KINDS: Mapping[str, str] = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(string)": "object",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def start_session(model: bytes | str, *, optimised: bool = False) -> onnxruntime.InferenceSession:
    """Starts a session of a serialised graph, or of a file."""
    options = onnxruntime.SessionOptions()
    # Its messages go to the caller as errors; nothing is printed beside them.
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return interrupts.start_session(model, options, providers=["CPUExecutionProvider"])


def numpy_lacks(type_text: str) -> bool:
    """Tells whether a tensor of this type (as a session states it) has no counterpart in numpy: bfloat16, float8,
    int4."""
    return type_text.startswith("tensor(") and type_text not in _NUMPY_KINDS


def run_in_onnxruntime(model: ModelProto, feeds: Mapping[str, Array]) -> Sequence[Array] | None:
    """Runs a graph; returns None where ONNX Runtime cannot run it, or cannot give its outputs in their own dtype."""
    try:
        session = start_session(model.SerializeToString())
        if any(numpy_lacks(entry.type) for entry in session.get_outputs()):
            return None
        outputs: Sequence[Array] = interrupts.run_session(session, feeds)
    except Exception:  # onnxruntime's own classes share no base but Exception.
        return None
    kinds = [_NUMPY_KINDS.get(entry.type) for entry in session.get_outputs()]
    is_right = all(
        not isinstance(array, np.ndarray) or array.dtype == kind for array, kind in zip(outputs, kinds, strict=True)
    )
    return outputs if is_right else None
