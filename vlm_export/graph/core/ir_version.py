"""What versions of ONNX's file format allow."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.graph.core.names import all_graphs

# Before it, every initializer is an input, too.
_PLAIN_INITIALIZERS = 4


def allow_plain_initializers(model: ir.Model) -> None:
    """Raises the model's IR version, where that is needed for an initializer that is no input."""
    if model.ir_version < _PLAIN_INITIALIZERS and any(
        not value.is_graph_input() for graph in all_graphs(model) for value in graph.initializers.values()
    ):
        raise_ir_version(model, _PLAIN_INITIALIZERS)


def weights_among_inputs(model: ir.Model) -> set[str]:
    """Names of weights that the model lists as inputs because its file format wants it: no caller can replace them.

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
