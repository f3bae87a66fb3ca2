"""What a model is, for people and machines: interface, operators, weights, what is not known of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx
import onnx_ir as ir

from vlm_export.graph.core.names import (
    all_graphs,
    all_nodes,
    defined_values,
    nested_graphs,
    opset_imports_of,
    root_graphs,
)
from vlm_export.graph.core.tensors import TensorSlot, tensor_slots

_LARGEST = 10


def describe_model(model: ir.Model) -> dict[str, Any]:
    """Describes the model as JSON values: strings, numbers, lists and objects."""
    tensors = {slot.identity: slot.tensor for slot in tensor_slots(model)}
    external = [tensor for tensor in tensors.values() if isinstance(tensor, ir.ExternalTensor)]
    inline = [slot for slot in tensor_slots(model) if not isinstance(slot.tensor, ir.ExternalTensor)]
    weights = [slot for slot in tensor_slots(model) if isinstance(slot.holder, ir.Value)]
    sizes: Counter[str] = Counter()
    for slot in weights:
        sizes[dtype_name(slot.tensor.dtype)] += slot.nbytes
    known = {schema.domain for schema in onnx.defs.get_all_schemas()}
    operators = Counter(operator_name(node) for node in all_nodes(model))
    return {
        "ir_version": model.ir_version,
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "inputs": [_value(value) for value in model.graph.inputs],
        "outputs": [_value(value) for value in model.graph.outputs],
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "graphs": sum(1 for _ in all_graphs(model)),
        "functions": [f"{entry.domain}:{entry.name}" for entry in model.functions.values()],
        "weights": {
            "count": len(weights),
            "bytes_by_dtype": dict(sizes.most_common()),
            "inline_bytes": sum(slot.nbytes for slot in inline),
            "external_bytes": sum(tensor.nbytes for tensor in external),
            "files": list(dict.fromkeys(str(tensor.location) for tensor in external)),
            "largest": [_weight(slot) for slot in sorted(weights, key=lambda slot: -slot.nbytes)[:_LARGEST]],
        },
        "unknown_shapes": _unknown(model),
        "custom_domains": dict(Counter(node.domain for node in all_nodes(model) if node.domain not in known)),
        "missing_imports": _missing_imports(model),
    }


def operator_name(node: ir.Node) -> str:
    """`Add`, or `com.microsoft:Gelu` for what is not ONNX's own."""
    return f"{node.domain}:{node.op_type}" if node.domain else node.op_type


def type_text(value: ir.Value) -> str:
    """`float32 (batch, 3, ?)`; a question mark for what is not known."""
    kind = "?" if value.type is None else dtype_text(value.type)
    if value.shape is None:
        return f"{kind} (…)"
    return f"{kind} ({', '.join(axis_text(axis) for axis in value.shape)})"


def dtype_text(kind: ir.TypeProtocol) -> str:
    """`float32`; `sequence of float32` and the like for what is no tensor."""
    for kind_class, prefix in ((ir.SequenceType, "sequence of "), (ir.OptionalType, "optional ")):
        if isinstance(kind, kind_class):
            return prefix + dtype_text(kind.elem_type)
    return dtype_name(kind.dtype)


def dtype_name(dtype: ir.DataType) -> str:
    """Returns the dtype's name in numpy, or ONNX's in lower case where numpy lacks it."""
    names = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
    return names.get(dtype, dtype.name.lower())


def axis_text(axis: int | ir.SymbolicDim) -> str:
    return str(axis) if isinstance(axis, int) else str(axis.value or "?")


def _value(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [axis if isinstance(axis, int) else axis.value for axis in value.shape]
    kind = None if value.type is None else dtype_text(value.type)
    return {"name": value.name, "dtype": kind, "shape": shape}


def _weight(slot: TensorSlot) -> dict[str, Any]:
    dtype, shape = dtype_name(slot.tensor.dtype), list(slot.tensor.shape.numpy())
    return {"name": slot.holder.name, "dtype": dtype, "shape": shape, "bytes": slot.nbytes}


def _unknown(model: ir.Model) -> dict[str, Any]:
    """Tensors of the main graph, and of what is nested in it, without dtype or rank, or with unnamed axes."""
    values = [value for graph in nested_graphs(model.graph) for value in defined_values(graph)]
    values = [value for value in values if not value.is_initializer()]
    return {
        "tensors": len(values),
        "without_dtype": _names(value for value in values if value.type is None),
        "without_shape": _names(value for value in values if value.shape is None),
        "with_unnamed_axes": _names(
            value for value in values if value.shape is not None and any(axis_text(axis) == "?" for axis in value.shape)
        ),
    }


def _names(values: Iterable[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _missing_imports(model: ir.Model) -> list[str]:
    missing = {
        node.domain or "ai.onnx"
        for root in root_graphs(model)
        for graph in nested_graphs(root)
        for node in graph
        if node.domain not in opset_imports_of(model, root)
    }
    return sorted(missing)
