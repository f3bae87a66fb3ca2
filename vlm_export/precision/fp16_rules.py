"""Which operators half precision leaves in float32: the whole rule set. docs/numerics.md says why."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir

LARGEST_FLOAT16 = 65504.0
# Initializers up to this size are looked at before a graph is converted; larger ones are seen when they are written.
CONSTANT_BYTES = 64 << 10

# They only move values: each takes the precision of what it moves.
MOVES = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape"),
        *("Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
# They read a shape, not values.
SHAPE_READERS = frozenset({"Shape", "Size"})
NORMS = frozenset(
    {
        *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
        *("LpNormalization", "MeanVarianceNormalization", "RMSNormalization"),
    }
)
SOFTMAXES = frozenset({"Hardmax", "LogSoftmax", "Softmax"})
# What a norm is made of where the opset has no operator for it, and other sums and powers of many values.
REDUCTIONS = frozenset(
    {
        *("CumSum", "Exp", "Log", "Pow", "Reciprocal", "Sqrt"),
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
        "ReduceSumSquare",
    }
)
# Conversions, and interpolation: where a sample lies decides more than its value.
CONVERSIONS = frozenset({"Cast", "CastLike", "GridSample", "Resize", "Upsample"})
FLOAT32_OPERATORS = NORMS | SOFTMAXES | REDUCTIONS | CONVERSIONS
# Stay in float32 beside a reduction: the steps of a norm between its mean, its root and its quotient.
ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})
# What comes out of them are activations, whatever went in: numbers of sizes and positions end here.
ACTIVATION_STARTS = NORMS | SOFTMAXES | {"Attention", "Conv", "ConvTranspose"}
# Attributes that name the dtype of what a node makes.
DTYPE_ATTRIBUTES = ("dtype", "output_datatype", "output_dtype", "to")


def takes_float16(node: ir.Node, opset: int) -> bool:
    """The operator's definition allows float16 wherever this node has float32."""
    if node.domain != "":
        return False
    inputs, outputs = _half_ports(node.op_type, opset)
    ports = [(inputs, node.inputs), (outputs, node.outputs)]
    return all(
        bool(allowed) and allowed[min(position, len(allowed) - 1)]
        for allowed, values in ports
        for position, value in enumerate(values)
        if value is not None and value.dtype == ir.DataType.FLOAT
    )


def is_bound_to_float32(node: ir.Node) -> bool:
    """The node says that it makes float32, or makes integers or truth values that are used."""
    attributes = (node.attributes.get(name) for name in DTYPE_ATTRIBUTES)
    if any(entry is not None and not entry.is_ref() and entry.value == ir.DataType.FLOAT for entry in attributes):
        return True
    used = (value for value in node.outputs if value.uses() or value.is_graph_output())
    return any(
        value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL) for value in used
    )


def makes_sequences(node: ir.Node, opset: int) -> tuple[bool, ...]:
    """For each output that the operator defines whether it is a sequence."""
    schema = _schema(node.op_type, opset) if node.domain == "" else None
    return () if schema is None else tuple(all(t.startswith("seq(") for t in port.types) for port in schema.outputs)


@cache
def _half_ports(op_type: str, opset: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each input and output of the operator whether float16 is allowed; the last one repeats if variadic."""
    schema = _schema(op_type, opset)
    if schema is None:
        return (), ()
    inputs, outputs = (
        tuple("tensor(float16)" in port.types for port in ports) for ports in (schema.inputs, schema.outputs)
    )
    return inputs, outputs


def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def fits_float16(tensor: ir.TensorProtocol) -> bool:
    """No value becomes infinite, and a lone number no zero: a weight that is nearly zero may become it."""
    values = tensor.numpy()
    if overflows(values):
        return False
    return values.size != 1 or bool(values.item() == 0) or bool(np.float16(values.item()) != 0)


def overflows(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    """A finite value is beyond what float16 holds; infinities stay what they are."""
    with np.errstate(over="ignore"):
        return bool((np.isinf(values.astype(np.float16)) & np.isfinite(values)).any())
