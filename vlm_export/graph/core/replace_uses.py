"""Small steps that several operations take: nodes that vanish with all their uses, constants that become operands."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import annotated_names, captured_or_read, subgraphs_of, taken_names, visible_value

# An input of a node: a tensor's name, the tensor, a constant, or None for an optional input that is left out.
Operand: TypeAlias = "str | ir.Value | npt.NDArray[np.generic] | ir.TensorProtocol | None"


def graph_of(value: ir.Value) -> ir.Graph:
    """Returns the graph that defines the value."""
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    assert graph is not None
    return graph


def discard_nodes(nodes: Sequence[ir.Node], annotated: Collection[str] | None = None) -> None:
    """Removes nodes of one graph with all that they read, and the constants that only they read.

    Nothing outside reads their outputs any more.

    Args:
        annotated: names that quantization annotations give; None: those of the graphs in which the constants are.
    """
    if not nodes:
        return
    graph = nodes[0].graph
    assert graph is not None
    sources = {value: None for node in nodes for value in captured_or_read(node)}
    for node in nodes:
        _forget_inputs(node)
    graph.remove(nodes)
    if annotated is None:
        annotated = annotated_names({value.graph for value in sources if value.graph is not None})
    for value in sources:
        if value.name not in annotated:
            _discard_constant(value)


def _forget_inputs(node: ir.Node) -> None:
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    # What a subgraph captured would otherwise keep a user that no longer exists.
    for subgraph in subgraphs_of(node):
        for inner in subgraph:
            _forget_inputs(inner)


def _discard_constant(value: ir.Value) -> None:
    if value.uses() or value.is_graph_input() or value.is_graph_output():
        return
    producer = value.producer()
    if value.is_initializer() and value.graph is not None:
        value.graph.initializers.pop(str(value.name))
    elif (
        producer is not None and producer.op_type == "Constant" and producer.domain == "" and producer.graph is not None
    ):
        producer.graph.remove(producer)


def replace_uses(value: ir.Value, new: ir.Value, besides: ir.Node | None = None) -> None:
    """Makes all readers of `value`, in nested graphs too, and the graph's outputs read `new` instead."""
    graph = value.graph if value.is_graph_output() else None
    for index, output in enumerate(graph.outputs if graph is not None else ()):
        if output is value and graph is not None:
            graph.outputs[index] = new
    for node, index in value.uses():
        if node is not besides:
            node.replace_input_with(index, new)


def check_new_name(root: ir.Graph, graph: ir.Graph, name: str) -> None:
    """GraphError when a value of `graph` cannot get that name."""
    if not name:
        raise GraphError("a tensor needs a name", fix="give a name that is not empty")
    if name in taken_names(root, graph):
        raise GraphError(f"a tensor is already named {name!r}", fix="choose another name, or rename that tensor first")


def resolve_operand(root: ir.Graph, graph: ir.Graph, operand: Operand) -> ir.Value | ir.TensorProtocol | None:
    """Returns an operand of a node in `graph`: what is visible there under its name, or a constant.

    Raises:
        GraphError: nothing of that name is visible there.
    """
    if operand is None:
        return None
    if isinstance(operand, str):
        return visible_value(graph, root, operand) if operand else None
    if isinstance(operand, ir.Value):
        if visible_value(graph, root, str(operand.name)) is not operand:
            raise GraphError(f"tensor {operand.name!r} is not visible in graph {graph.name!r}")
        return operand
    return ir.tensor(operand) if isinstance(operand, np.ndarray | np.generic) else operand


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Adds an initializer that holds the tensor, with its dtype and shape."""
    shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def add_constant_node(before: ir.Node, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Puts a Constant right before a node; functions, which have no initializers, can hold it."""
    value = ir.val(name, tensor.dtype, ir.Shape(tensor.shape.numpy()))
    before.prepend(ir.node("Constant", [], {"value": tensor}, outputs=[value]))
    return value


def place_first(graph: ir.Graph, node: ir.Node) -> None:
    """Puts a node at the beginning of the graph."""
    if len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def remove_node(node: ir.Node) -> None:
    """Removes a node that nothing reads, and the uses that its subgraphs make of outer values.

    The library leaves those uses behind, so that what only an If reads would never become unused.
    """
    for subgraph in subgraphs_of(node):
        for inner in ir.traversal.RecursiveGraphIterator(subgraph):
            inner.resize_inputs(0)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


def remove_unused_functions(model: ir.Model) -> int:
    """Removes functions that no node calls, in place; returns how many."""
    count = len(model.functions)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # onnx_ir states no types here
    return count - len(model.functions)


def bypass(output: ir.Value, source: ir.Value) -> bool:
    """Makes every reader of a node's output read `source`; False, with nothing changed, where that cannot be.

    An output of the graph keeps its name, dtype and shape: `source` takes them over, where it is made by a node of the
    same graph and is not itself an output.
    """
    is_output = output.is_graph_output()
    if is_output:
        maker, producer = output.producer(), source.producer()
        if maker is None or producer is None or producer.graph is not maker.graph or source.is_graph_output():
            return False
    name, kind, shape = output.name, output.type, output.shape
    ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
    if is_output:
        output.name = None
        source.name = name
    if (is_output or source.type is None) and kind is not None:
        source.type = kind
    if (is_output or source.shape is None) and shape is not None:
        source.shape = shape
    return True
