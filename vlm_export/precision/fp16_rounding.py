"""float16 as hardware computes it, on an engine that computes it in float32.

ONNX Runtime's CPU provider has few float16 kernels. It casts to float32 and removes the casts between neighbours
(1.31, at every optimisation level), so a chain neither rounds nor overflows there, unlike on a GPU or an ARM CPU.
"""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.precision.fp16_plan import is_sequence
from vlm_export.precision.fp16_rules import MOVES

# Concat has a float16 kernel everywhere and is not optimised away. A single one between float32 nodes is: ONNX Runtime
# runs an isolated float16 node in float32.
_BARRIERS = 2


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
