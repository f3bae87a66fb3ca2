"""Which values of a graph leave float16's range, by what they are when the graph runs on real inputs.

Weights alone do not tell: SigLIP's larger encoders have a few activations in the hundreds of thousands, which a
projection takes back. They are measured on a copy of the float32 graph that gives the range of each value.
"""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.precision.fp16 import planned_copy
from vlm_export.precision.fp16_plan import Plan, float_inputs, is_float
from vlm_export.precision.fp16_rules import LARGEST_FLOAT16, MOVES

# Other inputs than those that were measured reach further.
HEADROOM = 2.0
MOST = LARGEST_FLOAT16 / HEADROOM
_MARK = "vlm_export.range."


def graph_of_ranges(model: ir.Model) -> tuple[ir.Model, dict[str, str]]:
    """A copy with the model's inputs, whose outputs are the smallest and the largest element of values, two for each.

    Measured is what nodes compute and `convert_to_fp16` would make float16; what only moves holds nothing else.

    Returns:
        The copy, and output name → name of the value.

    Raises:
        InputError: as `convert_to_fp16`.
    """
    work, plan = planned_copy(model)
    ends: dict[ir.Value, str] = {}
    for value in halved_values(work.graph, plan):
        for op_type in ("ReduceMin", "ReduceMax"):
            node = ir.node(op_type, [value], {"keepdims": 0}, name=f"{_MARK}{len(ends)}")
            (end,) = node.outputs
            end.name, end.type, end.shape = node.name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            maker = value.producer()
            assert maker is not None
            # Right behind it: an engine that keeps the order of the file needs the value no longer than it did.
            work.graph.insert_after(maker, node)
            ends[end] = str(value.name)
    work.graph.outputs[:] = ends
    return work, {str(end.name): name for end, name in ends.items()}


def halved_values(graph: ir.Graph, plan: Plan) -> list[ir.Value]:
    """Results of nodes that are no moves, which a float16 node makes or reads: what a conversion rounds."""
    halved = [node for node in graph if node not in plan.float32_nodes]
    read = {value for node in halved for value in float_inputs(node)}
    return [
        value
        for node in graph
        if node.op_type not in MOVES
        for value in node.outputs
        if is_float(value) and (value in read or node not in plan.float32_nodes)
    ]
