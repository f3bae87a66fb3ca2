"""Nodes that return what they are given: casts to the same dtype, reshapes to the same shape, and the like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from vlm_export.graph.core.names import names_used, scopes
from vlm_export.graph.core.replace_uses import bypass, remove_node
from vlm_export.graph.passes.dead_code import remove_unused_initializers
from vlm_export.graph.passes.noop_rules import RULES


def remove_noops(model: ir.Model) -> Mapping[str, int]:
    """Removes nodes that provably return their input, in place.

    A Cast or Reshape goes only where its dtype or shape is proven equal from the graph's constants and stated shapes;
    symbolic axes count as equal only where the shape says "as it was" (0) or leaves one axis open (-1). Inputs and
    outputs of the graph keep their names; a no-op that leads from an input straight to an output stays. onnx_ir's
    `IdentityEliminationPass` renames one of two outputs that are Identities of one tensor, and knows Identity alone.

    Returns:
        Operator → how many were removed.
    """
    counts: Counter[str] = Counter()
    while removed := _sweep(model):
        counts += removed
    if counts:
        remove_unused_initializers(model)
    return dict(sorted(counts.items()))


def _sweep(model: ir.Model) -> Counter[str]:
    counts: Counter[str] = Counter()
    returned = names_used(model)
    for graph, opset in list(scopes(model)):
        for node in list(graph):
            rule = RULES.get(node.op_type) if node.domain == "" and node.graph is graph else None
            source = rule(node, opset) if rule is not None else None
            if source is None or any(value.name in returned for value in node.outputs):
                continue
            if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
                continue
            if _changes_kind(node, source) or not bypass(node.outputs[0], source):
                continue
            counts[node.op_type] += 1
            _remove_with_feeders(node, returned)
    return counts


def _changes_kind(node: ir.Node, source: ir.Value) -> bool:
    # An Identity may turn a tensor's stated kind into another: a sequence, an optional.
    kind = node.outputs[0].type
    return kind is not None and source.type is not None and type(kind) is not type(source.type)


def _remove_with_feeders(node: ir.Node, returned: set[str]) -> None:
    """Removes the node, and what only it read: the shape of a Reshape, the first of two that undo each other."""
    feeders = [value.producer() for value in node.inputs if value is not None]
    remove_node(node)
    for feeder in feeders:
        if feeder is None or feeder.graph is None:
            continue
        if not any(value.uses() or value.is_graph_output() or value.name in returned for value in feeder.outputs):
            _remove_with_feeders(feeder, returned)
