"""A float16 graph as hardware rounds it, and the same graph without any rounding: what the proof of float16 compares.

ONNX Runtime's CPU provider has few float16 kernels. It casts to float32 and removes the casts between neighbours
(1.31, at every optimisation level), so a chain neither rounds nor overflows there, unlike on a GPU or an ARM CPU:
`round_every_float16` puts barriers between them.

Rounding hides a fault that is smaller than itself. Without it (`undo_rounding`) the graph's own nodes and attributes,
with the weights that they had before they were rounded, must equal the Reference as closely as a float32 graph must, so
that a wrong constant, epsilon or node shows as clearly as it would there.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from vlm_export.precision.fp16_plan import is_sequence
from vlm_export.precision.fp16_rules import DTYPE_ATTRIBUTES, MOVES

# Concat has a float16 kernel everywhere and is not optimised away. A single one between float32 nodes is: ONNX Runtime
# runs an isolated float16 node in float32.
_BARRIERS = 2
_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
Original = Callable[[], ir.TensorProtocol]
"""Makes an initializer's float32 tensor when it is written, one at a time: memory stays flat."""


def round_every_float16(model: ir.Model) -> int:
    """Puts behind each node that computes float16 what makes its result float16 indeed, in place; returns how many.

    The model computes the same: the nodes put in concatenate one tensor with nothing.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type in MOVES:
            continue
        for value in node.outputs:
            has_axis = value.shape is None or len(value.shape) > 0
            if value.dtype == ir.DataType.FLOAT16 and has_axis and value.uses() and not is_sequence(value):
                _put_behind(model.graph, node, value)
                count += 1
    return count


def _put_behind(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    users, made, before = list(value.uses()), value, node
    for number in range(_BARRIERS):
        barrier = ir.node("Concat", [made], {"axis": 0}, name=f"{value.name}.rounded.{number}")
        barrier.outputs[0].name = f"{value.name}.rounded.{number}"
        barrier.outputs[0].shape, barrier.outputs[0].type = value.shape, value.type
        graph.insert_after(before, barrier)
        made, before = barrier.outputs[0], barrier
    for user, position in users:
        user.replace_input_with(position, made)


def undo_rounding(model: ir.Model, original: Callable[[str], Original | None]) -> tuple[str, ...]:
    """Makes every float16 value of the graph float32, in place; casts between the two remain and do nothing.

    Args:
        original: name of an initializer → what makes its float32 tensor, None where that is not known.

    Returns:
        The initializers whose float32 values are not known; where there are any, the graph is of no use.
    """
    unknown = [
        name for name, value in model.graph.initializers.items() if value.dtype == _HALF and original(name) is None
    ]
    if unknown:
        return tuple(unknown)
    for name, value in model.graph.initializers.items():
        make = original(name) if value.dtype == _HALF else None
        if make is None or value.const_value is None:
            continue
        shape = ir.Shape(value.const_value.shape.numpy())
        value.const_value = ir.LazyTensor(make, dtype=_FLOAT, shape=shape, name=name)
        value.type = ir.TensorType(_FLOAT)
    for node in model.graph:
        for name, entry in list(node.attributes.items()):
            if entry.type == ir.AttributeType.INT and name in DTYPE_ATTRIBUTES and entry.value == _HALF:
                node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
            elif entry.type == ir.AttributeType.TENSOR and entry.value.dtype == _HALF:
                node.attributes[name] = ir.AttrTensor(name, _widened(entry.value))
        for value in node.outputs:
            if value.dtype == _HALF and isinstance(value.type, ir.TensorType):
                value.type = ir.TensorType(_FLOAT)
    return ()


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype("float32"), name=tensor.name)
