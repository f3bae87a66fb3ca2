"""What passes share: constants, removal of nodes, readers moved from one value to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.graph.core.names import (
    all_graphs,
    annotated_names,
    nested_graphs,
    root_graphs,
    subgraphs_of,
    unbound_outputs,
)

# Of shapes, axes, permutations and the like: what is larger is no argument.
MAX_ARGUMENT_BYTES = 1 << 16


def scopes(model: ir.Model) -> Iterator[tuple[ir.Graph, int]]:
    """Every graph, with the version of ONNX's own operators that holds in it (0: not imported)."""
    for root in root_graphs(model):
        opset = root.opset_imports.get("", 0)
        for graph in nested_graphs(root):
            yield graph, opset


def names_used(model: ir.Model) -> set[str]:
    """Names of values with uses that the library does not know of: outer ones that a subgraph returns as they are, and
    scales and zero points of quantization annotations."""
    returned = {str(value.name) for graph in all_graphs(model) for value in unbound_outputs(graph)}
    return returned | annotated_names(all_graphs(model))


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


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override, or of a Constant node."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Constant":
        return None
    return ir.convenience.get_const_tensor(value)


def constant_argument(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A small constant's content: an axis, a shape, a permutation; None where it is not constant or too large."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > MAX_ARGUMENT_BYTES:
        return None
    array: npt.NDArray[Any] = np.asarray(tensor.numpy())
    return array


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """A small constant's integers, flat."""
    array = constant_argument(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(entry) for entry in array.reshape(-1)]


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """An input, None also where the node states fewer."""
    return node.inputs[index] if index < len(node.inputs) else None


def sizes_of(value: ir.Value | None) -> list[int] | None:
    """All axes' sizes, None unless the shape is known and fixed."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return list(value.shape.numpy())


def rank_of(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
