"""CastLike made Cast: its target dtype is known, so a constant behind it can be folded."""

from __future__ import annotations

import onnx_ir as ir


def replace_cast_likes(model: ir.Model) -> int:
    """Replaces each CastLike whose target dtype is known by a Cast, in place; returns how many.

    The dynamo back end writes a convolution's absent bias as a zero cast like its weight.
    """
    count = 0
    for node in list(model.graph):
        like = node.inputs[1] if node.op_type == "CastLike" else None
        dtype = like.dtype if like is not None else None
        if dtype is None:
            continue
        cast = ir.node("Cast", [node.inputs[0]], {"to": dtype}, num_outputs=1, name=node.name)
        cast.outputs[0].name = node.outputs[0].name
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), node.outputs[0].shape
        model.graph.insert_before(node, cast)
        ir.convenience.replace_all_uses_with(node.outputs[0], cast.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count
