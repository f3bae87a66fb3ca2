"""What no output depends on: nodes, initializers, functions."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.graph.core.names import all_graphs, names_used, nested_graphs, root_graphs
from vlm_export.graph.core.replace_uses import remove_node, remove_unused_functions


@dataclass(frozen=True)
class DeadCode:
    """How much was removed."""

    nodes: int
    initializers: int
    functions: int

    def __bool__(self) -> bool:
        return bool(self.nodes or self.initializers or self.functions)


def remove_dead_code(model: ir.Model) -> DeadCode:
    """Removes, in place, what no output depends on; inputs stay, used or not.

    onnx_ir's `RemoveUnusedNodesPass` leaves what only a removed If or Loop read and unused initializers of subgraphs,
    and removes scales and zero points that a quantization annotation names. Its pass for functions is used.
    """
    nodes = 0
    while True:
        used = names_used(model)
        removed = sum(_remove_nodes(root, used) for root in root_graphs(model))
        nodes += removed
        # What only a removed value's annotation named is used no more.
        if not removed or names_used(model) == used:
            break
    return DeadCode(nodes, remove_unused_initializers(model), remove_unused_functions(model))


def _remove_nodes(root: ir.Graph, used: set[str]) -> int:
    count = 0
    # Inner graphs first: what they no longer read may be dead outside.
    for graph in reversed(list(nested_graphs(root))):
        for node in reversed(graph):
            if any(value.uses() or value.is_graph_output() or value.name in used for value in node.outputs):
                continue
            remove_node(node)
            count += 1
    return count


def remove_unused_initializers(model: ir.Model) -> int:
    """Removes initializers that nothing reads and that are neither inputs nor outputs; returns how many."""
    used = names_used(model)
    count = 0
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if value.uses() or value.is_graph_input() or value.is_graph_output() or name in used:
                continue
            del graph.initializers[name]
            count += 1
    return count
