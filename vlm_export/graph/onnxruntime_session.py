"""Graphs run in ONNX Runtime as they are written: one thread, none of its optimisations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import onnxruntime
from onnx import ModelProto

Array: TypeAlias = npt.NDArray[Any]


def start_session(model: bytes | str) -> onnxruntime.InferenceSession:
    """A session of a serialised graph, or of a file."""
    options = onnxruntime.SessionOptions()
    # Its messages go to the caller as errors; nothing is printed beside them.
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_in_onnxruntime(model: ModelProto, feeds: Mapping[str, Array]) -> Sequence[Array] | None:
    """The outputs; None where ONNX Runtime cannot run the graph."""
    try:
        outputs: Sequence[Array] = start_session(model.SerializeToString()).run(None, dict(feeds))
    except Exception:  # onnxruntime's own classes share no base but Exception.
        return None
    return outputs
