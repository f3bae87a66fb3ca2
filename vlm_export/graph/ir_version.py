"""What versions of ONNX's file format allow."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.graph.names import all_graphs

# Before it, every initializer is an input, too.
_PLAIN_INITIALIZERS = 4


def allow_plain_initializers(model: ir.Model) -> None:
    """Raises the model's IR version, where that is needed for an initializer that is no input."""
    if model.ir_version < _PLAIN_INITIALIZERS and any(
        not value.is_graph_input() for graph in all_graphs(model) for value in graph.initializers.values()
    ):
        model.ir_version = _PLAIN_INITIALIZERS
