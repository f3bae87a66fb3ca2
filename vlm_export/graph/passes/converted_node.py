"""A converted node beside the node that it stands for: types that fit, and the same values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from vlm_export.graph.core.onnxruntime_session import Array, run_in_onnxruntime
from vlm_export.graph.core.operators import RANDOM
from vlm_export.graph.prove.random_inputs import draw_feeds

# Larger tensors are cut down where their axes are open, and otherwise not tried.
_MAX_ELEMENTS = 1 << 18
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def type_fault(model: onnx.ModelProto) -> str:
    """Returns what ONNX's inference says against the types of a model; "" where it says nothing."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    # Inference raises exceptions of several unrelated classes.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1][-200:] if lines else type(error).__name__
    return ""


def recast_constants(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Gives the float constants that a converter added the dtype of what they are used with.

    Constants that were inputs of the node (named iN) keep theirs.
    """
    if dtype not in _FLOATS:
        return
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS and not name.startswith("i"):
            value.const_value = _recast(tensor, dtype, name)
            value.type = ir.TensorType(dtype)
    for node in graph:
        tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None and tensor.dtype in _FLOATS:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", _recast(tensor, dtype, tensor.name))
            node.outputs[0].type = ir.TensorType(dtype)


def _recast(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    # A bound beyond the dtype's range becomes infinite, and bounds nothing as before.
    with np.errstate(over="ignore"):
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name)


def value_fault(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """Returns how the values of two models of one node differ on random inputs; "" where they do not, or cannot be
    compared."""
    return _value_fault(before.SerializeToString(deterministic=True), after.SerializeToString(deterministic=True))


@lru_cache(maxsize=4096)
def _value_fault(before: bytes, after: bytes) -> str:
    first, second = onnx.ModelProto.FromString(before), onnx.ModelProto.FromString(after)
    if any(node.op_type in RANDOM for node in (*first.graph.node, *second.graph.node)):
        return ""
    feeds = _feeds(first)
    expected = run_in_onnxruntime(first, feeds) if feeds is not None else None
    if feeds is None or expected is None:
        return ""
    got = run_in_onnxruntime(second, feeds)
    if got is None:
        # An engine lacks some operators in some dtypes: that is no fault of the form.
        return ""
    for name, left, right in zip((entry.name for entry in first.graph.output), expected, got, strict=True):
        fault = _difference(left, right)
        if fault:
            return f"output {name[1:]} {fault}"
    return ""


def _feeds(model: onnx.ModelProto) -> Mapping[str, Array] | None:
    given = {tensor.name for tensor in model.graph.initializer}
    inputs = {entry.name: ir.from_proto(entry) for entry in model.graph.input if entry.name not in given}
    for value in inputs.values():
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            return None
        if prod(size if isinstance(size, int) else 8 for size in value.shape) > _MAX_ELEMENTS:
            return None
    try:
        return draw_feeds(inputs, {}, (2, 3, 5, 4), {}, 0)
    # No values can be drawn for some dtypes.
    except Exception:
        return None


def _difference(left: Array, right: Array) -> str:
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        return ""
    if left.dtype != right.dtype or left.shape != right.shape:
        return f"is {right.dtype} {right.shape} instead of {left.dtype} {left.shape}"
    if left.dtype.kind != "f":
        return "" if np.array_equal(left, right) else "has other values"
    if not np.allclose(left.astype(np.float64), right.astype(np.float64), rtol=1e-3, atol=1e-5, equal_nan=True):
        return "has other values"
    return ""
