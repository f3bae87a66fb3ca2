"""CastLike made Cast: its target dtype is known, so a constant behind it can be folded."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.graph.core.replace_uses import replace_uses


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
        new = ir.val(node.outputs[0].name, dtype, node.outputs[0].shape)
        node.prepend(ir.node("Cast", [node.inputs[0]], {"to": dtype}, outputs=[new], name=node.name))
        replace_uses(node.outputs[0], new)
        model.graph.remove(node, safe=True)
        count += 1
    return count
