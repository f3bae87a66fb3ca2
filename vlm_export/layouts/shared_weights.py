"""Weights of one graph taken from the data files of others in its folder, so that the disk holds them once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.bundle.initializers import StoredValues

StoredKey: TypeAlias = tuple[str, int, tuple[int, ...]]
"""sha256 of the bytes, the number of TensorProto.DataType, and the shape."""
_SMALLEST_BYTES = 1024  # smaller ones stay in the graph, as in `Storage`


def refer_to_weights(model: ir.Model, known: Mapping[StoredKey, StoredValues]) -> frozenset[Path]:
    """Makes initializers refer to equal values that lie in data files.

    Returns:
        The data files that the model now refers to.
    """
    used = set()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALLEST_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        shape = tuple(map(int, tensor.shape.numpy()))
        at = known.get((hashlib.sha256(tensor.tobytes()).hexdigest(), int(tensor.dtype), shape))
        if at is not None:
            value.const_value = ir.ExternalTensor(
                at.path.name,
                at.offset,
                at.length,
                tensor.dtype,
                shape=ir.Shape(shape),
                name=name,
                base_dir=at.path.parent,
            )
            used.add(at.path)
    return frozenset(used)
