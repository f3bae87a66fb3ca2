"""A graph without its weights: large initializers become inputs, so that tools that copy a model copy kilobytes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from vlm_export.graph.core.names import all_graphs

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


# Before it, every initializer is an input, too.
_PLAIN_INITIALIZERS = 4


def allow_plain_initializers(model: ir.Model) -> None:
    """Raises the model's IR version, where that is needed for an initializer that is no input."""
    if model.ir_version < _PLAIN_INITIALIZERS and any(
        not value.is_graph_input() for graph in all_graphs(model) for value in graph.initializers.values()
    ):
        raise_ir_version(model, _PLAIN_INITIALIZERS)


def weights_among_inputs(model: ir.Model) -> set[str]:
    """Returns names of weights that the model lists as inputs because its file format wants it: no caller can replace
    them.

    ONNX Runtime treats them so, too: before IR version 4 a session has no overridable initializers.
    """
    if model.ir_version >= _PLAIN_INITIALIZERS:
        return set()
    return {str(value.name) for value in model.graph.inputs if value.is_initializer()}


def raise_ir_version(model: ir.Model, version: int) -> None:
    """Raises the model's IR version to `version` at least; its weights stay what no caller can replace."""
    if model.ir_version < _PLAIN_INITIALIZERS <= version:
        inputs = model.graph.inputs
        inputs[:] = [value for value in inputs if not value.is_initializer()]
    model.ir_version = max(model.ir_version, version)
