"""Small steps that several operations take: nodes that vanish with all their uses, constants that become operands."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import (
    annotated_names,
    captured_or_read,
    graph_of,
    nested_nodes,
    subgraphs_of,
    visible_value,
)

# An input of a node: a tensor's name, the tensor, a constant, or None for an optional input that is left out.
Operand: TypeAlias = "str | ir.Value | npt.NDArray[np.generic] | ir.TensorProtocol | None"


def discard_nodes(nodes: Sequence[ir.Node], annotated: Collection[str] | None = None) -> None:
    """Removes nodes of one graph with all that they read, and the constants that only they read.

    Nothing outside reads their outputs any more.

    Args:
        annotated: names that quantization annotations give; None: those of the graphs in which the constants are.
    """
    sources = dict.fromkeys(value for node in nodes for value in captured_or_read(node))
    for node in nodes:
        node.resize_inputs(0)
        _forget_captures(node)
        graph_of(node).remove(node)
    if annotated is None:
        annotated = annotated_names({value.graph for value in sources if value.graph is not None})
    for value in sources:
        if value.name not in annotated:
            _discard_constant(value)


def _forget_captures(node: ir.Node) -> None:
    """What a subgraph captured would otherwise keep a user that no longer exists: the library leaves those uses."""
    for subgraph in subgraphs_of(node):
        for inner in nested_nodes(subgraph):
            inner.resize_inputs(0)


def _discard_constant(value: ir.Value) -> None:
    if value.uses() or value.is_graph_input() or value.is_graph_output():
        return
    producer = value.producer()
    if value.is_initializer() and value.graph is not None:
        value.graph.initializers.pop(str(value.name))
    elif (
        producer is not None and producer.graph is not None and (producer.domain, producer.op_type) == ("", "Constant")
    ):
        producer.graph.remove(producer)


def replace_uses(value: ir.Value, new: ir.Value, besides: ir.Node | None = None) -> None:
    """Makes all readers of `value`, in nested graphs too, and the graph's outputs read `new` instead."""
    if value.is_graph_output():
        outputs = graph_of(value).outputs
        outputs[:] = [new if output is value else output for output in outputs]
    for node, index in value.uses():
        if node is not besides:
            node.replace_input_with(index, new)


def resolve_operand(root: ir.Graph, graph: ir.Graph, operand: Operand) -> ir.Value | ir.TensorProtocol | None:
    """Returns an operand of a node in `graph`: what is visible there under its name, or a constant.

    Raises:
        GraphError: nothing of that name is visible there.
    """
    if operand is None or isinstance(operand, str):
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


def add_constant(graph: ir.Graph, tensor: ir.TensorProtocol, name: str, *, before: ir.Node | None = None) -> ir.Value:
    """Adds a constant: an initializer, or a Constant right before a node, for functions can have no initializers."""
    if before is None:
        return add_initializer(graph, tensor, name)
    value = ir.val(name, tensor.dtype, ir.Shape(tensor.shape.numpy()))
    before.prepend(ir.node("Constant", [], {"value": tensor}, outputs=[value]))
    return value


def place_behind(producer: ir.Node | None, graph: ir.Graph, node: ir.Node) -> None:
    """Puts a node right behind what makes the tensor that it reads, or at the beginning of the graph."""
    if producer is not None and producer.graph is graph:
        graph.insert_after(producer, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def remove_node(node: ir.Node) -> None:
    """Removes a node that nothing reads, and the uses that its subgraphs make of outer values."""
    _forget_captures(node)
    graph_of(node).remove(node, safe=True)


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
    if is_output and (source.producer() is None or source.graph is not output.graph or source.is_graph_output()):
        return False
    name, kind, shape = output.name, output.type, output.shape
    replace_uses(output, source)
    if is_output:
        output.name, source.name = None, name
    if (is_output or source.type is None) and kind is not None:
        source.type = kind
    if (is_output or source.shape is None) and shape is not None:
        source.shape = shape
    return True
