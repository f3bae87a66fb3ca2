"""A graph without its weights: large initializers become inputs, so that tools that copy a model copy kilobytes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

# Small initializers stay: they are shapes, scalars and biases, which a simplifier must see to fold.
SKELETON_THRESHOLD_BYTES = 4096
_IS_DEFAULT = "vlm_export.is_default"


def detach_weights(model: ir.Model, threshold_bytes: int = SKELETON_THRESHOLD_BYTES) -> dict[str, ir.TensorProtocol]:
    """Turns every initializer larger than the threshold into a graph input, in place.

    Returns:
        Initializer name → its tensor, to be given back with `attach_weights`.
    """
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= threshold_bytes:
            continue
        weights[name] = tensor
        value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
        value.const_value = None
        del model.graph.initializers[name]
        if value.is_graph_input():
            # Old models list weights among the inputs: there an initializer is an input's default.
            value.meta[_IS_DEFAULT] = True
        else:
            model.graph.inputs.append(value)
    return weights


def attach_weights(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Turns the inputs named in `weights` back into initializers, in place; unused ones are dropped."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in weights]:
        if not value.meta.pop(_IS_DEFAULT, False):
            graph.inputs.remove(value)
            if not value.uses():
                continue
        value.const_value = weights[value.name or ""]
        graph.register_initializer(value)
