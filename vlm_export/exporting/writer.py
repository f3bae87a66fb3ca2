"""Writes a graph, weights streamed one at a time, in one file or with external data."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

DEFAULT_THRESHOLD_BYTES = 64 << 20
# Smaller tensors stay in the graph file, where a reader and a simplifier see their values.
_INLINE_TENSOR_BYTES = 1024


def weights_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def write_graph(model: ir.Model, path: Path, threshold_bytes: int = DEFAULT_THRESHOLD_BYTES) -> list[Path]:
    """Writes `path`, and `path` + "_data" beside it when the weights exceed the threshold; returns both or one.

    The model itself is left as it was: its tensors still refer to where they came from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if weights_bytes(model) <= threshold_bytes:
        ir.save(model, path)
        return [path]
    data = path.with_name(path.name + "_data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_TENSOR_BYTES, max_workers=1)
    return [path, data]
