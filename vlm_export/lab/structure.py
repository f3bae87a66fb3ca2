"""The canonical structure of a graph as lines of text: no name of a node or tensor, and no order of nodes, is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx_ir as ir

from vlm_export.lab.alignment import COMMUTATIVE, node_settings
from vlm_export.lab.graph_diff import counted, inlined, is_parameter, operator_text
from vlm_export.lab.module_paths import constant_of, module_paths
from vlm_export.lab.regress_state import SEPARATOR, WHOLE

_DIGEST_CHARACTERS = 12


def structure_lines(model: ir.Model) -> dict[str, str]:
    """Module → "Add, 2 MatMul | 1a2b3c4d5e6f", and for the whole graph how everything is connected.

    The digest of a module is of each node's operator, attributes, and what it reads: an input, a constant's values, a
    weight's dtype and shape, or the operator whose output it is. Values of weights are no structure.
    """
    model = inlined(model)
    operators: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    computed = dict[ir.Value, str]()
    paths = module_paths(model.graph)
    for node in model.graph:
        if constant_of(node.outputs[0]) is not None:
            continue
        settings = _settings(node, model)
        operators.setdefault(paths[node], []).append(operator_text(node))
        lines.setdefault(paths[node], []).append(f"{settings} {_inputs(node, {})}")
        place = _digest(f"{settings} {_inputs(node, computed)}")
        computed |= {value: f"{place}:{index}" for index, value in enumerate(node.outputs)}
    ends = [_value_text(value, computed) for value in model.graph.outputs]
    total = counted(sorted(name for names in operators.values() for name in names))
    found = {
        path or "(no module)": counted(sorted(names)) + SEPARATOR + _digest(*sorted(lines[path]))
        for path, names in operators.items()
    }
    return {WHOLE: total + SEPARATOR + _digest(*ends), **found}


def _settings(node: ir.Node, model: ir.Model) -> str:
    opset = node.version or model.graph.opset_imports.get(node.domain)
    return f"{operator_text(node)} {sorted(node_settings(node, opset).items())}"


def _inputs(node: ir.Node, computed: Mapping[ir.Value, str]) -> list[str]:
    found = [_value_text(value, computed) for value in node.inputs]
    return sorted(found) if (node.domain, node.op_type) in COMMUTATIVE else found


def _value_text(value: ir.Value | None, computed: Mapping[ir.Value, str]) -> str:
    if value is None:
        return "-"
    tensor = constant_of(value)
    if tensor is not None:
        kind = f"{tensor.dtype} {list(tensor.shape.numpy())}"
        return f"weight {kind}" if is_parameter(value) else f"constant {kind} {_digest(tensor.tobytes())}"
    node = value.producer()
    if node is None:
        return f"input {value.name}"
    return computed.get(value) or f"{operator_text(node)}:{node.outputs.index(value)}"


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:_DIGEST_CHARACTERS]
