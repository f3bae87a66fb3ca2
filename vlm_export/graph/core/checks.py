"""Whether a model is sound, also when it is too large for ONNX's own checker."""

from __future__ import annotations

import onnx_ir as ir

from vlm_export.graph.core.errors import GraphError
from vlm_export.graph.core.inference import check, copy_of, infer
from vlm_export.graph.core.names import all_graphs, defined_values, unbound_outputs
from vlm_export.graph.core.transaction import captured_or_read, is_sorted


def validate(model: ir.Model, *, types: bool = True) -> None:
    """Refuses a model that is not valid; weights are not read, so its size does not matter.

    Args:
        types: infer types and shapes strictly, too.

    Raises:
        GraphError: what was found first: a tensor that nothing makes or two things make, nodes out of order or in a
            cycle, what ONNX's checker refuses, dtypes or shapes that do not fit together.
    """
    _check_makers(model)
    _check_order(model)
    check(copy_of(model).model)
    if types:
        infer(copy_of(model).model)


def _check_makers(model: ir.Model) -> None:
    known: set[ir.Value] = set()
    for graph in all_graphs(model):
        own = list(defined_values(graph))
        names = [value.name for value in own]
        twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if twice:
            raise GraphError(f"graph {graph.name!r} defines tensors twice", got=str(sorted(map(str, twice))))
        known.update(own)
        for value in unbound_outputs(graph):
            raise GraphError(
                f"graph {graph.name!r} returns {value.name!r}, which nothing in it makes",
                fix="return an Identity of the outer tensor",
            )
    for graph in all_graphs(model):
        for node in graph:
            for read in node.inputs:
                if read is not None and read not in known:
                    raise GraphError(f"node {node.name!r} reads {read.name!r}, which nothing makes")


def _check_order(model: ir.Model) -> None:
    if is_sorted(model):
        return
    for graph in all_graphs(model):
        done: set[ir.Node] = set()
        waiting = list(graph)
        while waiting:
            ready = [node for node in waiting if _is_ready(node, graph, done)]
            if not ready:
                names = [node.name or str(node.outputs[0].name) for node in waiting][:8]
                raise GraphError("the graph has a cycle", got=f"among nodes {names}")
            done.update(ready)
            waiting = [node for node in waiting if node not in done]
    raise GraphError("nodes stand before what they read", fix="sort the graph")


def _is_ready(node: ir.Node, graph: ir.Graph, done: set[ir.Node]) -> bool:
    producers = (value.producer() for value in captured_or_read(node))
    return all(producer is None or producer.graph is not graph or producer in done for producer in producers)
