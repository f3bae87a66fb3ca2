"""The canonical structure of a graph as lines of text: no name of a node or tensor, and no order of nodes, is in it."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.lab.canonical import (
    SEPARATOR,
    GraphTexts,
    computed_digests,
    contents,
    counted,
    digest,
    is_constant_node,
    kinds,
    operator_text,
)
from vlm_export.lab.graph_diff import is_parameter, normalised
from vlm_export.lab.module_paths import module_paths
from vlm_export.lab.regress_state import WHOLE


def structure_lines(model: ir.Model) -> dict[str, str]:
    """Module → "Add, 2 MatMul | 1a2b3c4d5e6f", and for the whole graph how everything is connected.

    The digest of a module is of each node's operator, attributes, and what it reads: an input, a constant's values, a
    weight's dtype and shape, or the operator whose output it is. Values of weights are no structure.
    """
    model = normalised(model)
    operators: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    texts, paths = GraphTexts(model, _constant_text), module_paths(model.graph)
    for node in model.graph:
        if is_constant_node(node):
            continue
        operators.setdefault(paths[node], []).append(operator_text(node))
        settings = sorted(texts.settings(node).items())
        lines.setdefault(paths[node], []).append(f"{operator_text(node)} {settings} {texts.inputs(node)}")
    total = counted(sorted(name for names in operators.values() for name in names))
    found = {
        path or "(no module)": counted(sorted(names)) + SEPARATOR + digest(*sorted(lines[path]))
        for path, names in operators.items()
    }
    return {WHOLE: total + SEPARATOR + digest(*computed_digests(model, _constant_text).values()), **found}


def _constant_text(value: ir.Value, tensor: ir.TensorProtocol) -> str:
    return f"weight {kinds(value, tensor)}" if is_parameter(value) else contents(value, tensor)
