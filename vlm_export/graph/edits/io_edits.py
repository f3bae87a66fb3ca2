"""The interface of a model: tensors renamed, outputs added and dropped, inputs and outputs put in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from vlm_export.errors import GraphError, suggestion
from vlm_export.graph.core.inference import Copy, known_infos
from vlm_export.graph.core.names import (
    TensorRef,
    annotated_names,
    captured_or_read,
    defined_values,
    enclosing_graphs,
    find_value,
    nested_graphs,
    parents_of,
    rename_values,
    root_of,
)
from vlm_export.graph.core.replace_uses import discard_nodes, graph_of
from vlm_export.graph.core.transaction import Change, apply


def rename_tensor(model: ir.Model, old: TensorRef, new: str, *, function: str = "") -> int:
    """Gives a tensor another name wherever it is used: interface, nodes, subgraphs, annotations.

    Args:
        old: a tensor of the main graph, or of the one subgraph that has the name.
        function: the tensor is in this function's body.

    Returns:
        How many nodes' inputs read it.

    Raises:
        GraphError: unknown, or the new name is taken in a graph where both would be visible.
    """
    value = find_value(model, old, function)
    _rename(model, {value: new})
    return len(value.uses())


def rename_tensors(model: ir.Model, names: Mapping[str, str], *, function: str = "") -> int:
    """Renames several tensors at once, so that names can be swapped; returns how many were renamed."""
    _rename(model, {find_value(model, old, function): new for old, new in names.items()})
    return len(names)


def _rename(model: ir.Model, names: dict[ir.Value, str]) -> None:
    by_root: dict[ir.Graph, dict[ir.Value, str]] = {}
    for value, new in names.items():
        root = root_of(model, graph_of(value))
        parents = parents_of(root)
        around = {*enclosing_graphs(graph_of(value), parents), *nested_graphs(graph_of(value))}
        if not new:
            raise GraphError(f"tensor {value.name!r} needs a name", fix="give a name that is not empty")
        for other in (other for graph in around for other in defined_values(graph)):
            if other is not value and names.get(other, other.name) == new:
                raise GraphError(
                    f"a tensor is already named {new!r}", fix="choose another name, or rename that tensor too"
                )
        by_root.setdefault(root, {})[value] = new
    for root, values in by_root.items():
        rename_values(root, values)


def add_output(model: ir.Model, tensors: TensorRef | Sequence[TensorRef]) -> int:
    """Makes tensors of the main graph outputs, behind those that are there: a tap for debugging.

    Returns:
        How many outputs were added.

    Raises:
        GraphError: unknown, an output already, inside a subgraph or function, or of a type that cannot be told.
    """
    names = [tensors] if isinstance(tensors, str | ir.Value) else list(tensors)
    values = list(dict.fromkeys(find_value(model, name) for name in names))
    for value in values:
        if graph_of(value) is not model.graph:
            raise GraphError(
                f"tensor {value.name!r} is inside a subgraph or function, which alone knows it",
                fix="add an output to that subgraph's node, or tap what the node makes",
            )
        if value.is_graph_output():
            raise GraphError(f"tensor {value.name!r} is an output already")
    infos = known_infos(model, values)

    def edit(copy: Copy) -> Change:
        for value, info in infos.items():
            copy.of(value).type, copy.of(value).shape = info.type, info.shape
            copy.model.graph.outputs.append(copy.of(value))
        return Change()

    apply(model, edit)
    return len(values)


def drop_output(model: ir.Model, names: str | Sequence[str], *, prune: bool = True) -> int:
    """Removes outputs of the model, and the nodes and constants that nothing needs any more.

    Args:
        prune: False keeps those nodes.

    Returns:
        How many nodes were removed.

    Raises:
        GraphError: no such output, or none would be left.
    """
    dropped = _interface_values("output", model.graph.outputs, [names] if isinstance(names, str) else names)
    if len(set(model.graph.outputs) - set(dropped)) == 0:
        raise GraphError("the model would have no output", got=f"outputs {[value.name for value in dropped]}")
    for value in dropped:
        while value in model.graph.outputs:
            model.graph.outputs.remove(value)
    count = len(model.graph)
    if prune:
        _prune(dropped)
    return count - len(model.graph)


def _prune(values: Sequence[ir.Value]) -> None:
    waiting = list(values)
    annotated = annotated_names({graph_of(value) for value in values})
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        waiting += captured_or_read(node)
        discard_nodes([node], annotated)


def reorder_interface(
    model: ir.Model, *, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> None:
    """Puts the inputs, the outputs or both into the order of the names.

    Raises:
        GraphError: a name that is none of theirs, is missing, or occurs twice.
    """
    orders = [
        (kind, values, _interface_values(kind, values, names))
        for kind, values, names in (("input", model.graph.inputs, inputs), ("output", model.graph.outputs, outputs))
        if names is not None
    ]
    for kind, values, order in orders:
        if len(order) != len(values) or len(set(order)) != len(set(values)):
            raise GraphError(
                f"the new order is not one of all {kind}s",
                expected=str([value.name for value in values]),
                got=str([value.name for value in order]),
                fix="name each of them once",
            )
    for _, values, order in orders:
        values.clear()
        values.extend(order)


def _interface_values(kind: str, values: Sequence[ir.Value], names: Sequence[str]) -> list[ir.Value]:
    known = {str(value.name): value for value in values}
    for name in names:
        if name not in known:
            raise GraphError(f"the model has no {kind} {name!r}", fix=suggestion(name, known))
    return [known[name] for name in names]
