"""The interface of a model: tensors renamed, outputs added and dropped, other orders and other dtypes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from vlm_export.errors import GraphError, suggestion
from vlm_export.graph.core.inference import Copy, known_infos
from vlm_export.graph.core.names import (
    TensorRef,
    annotated_names,
    captured_or_read,
    defined_values,
    find_value,
    find_values,
    fresh_name,
    fresh_node_name,
    graph_of,
    interface_value,
    related_graphs,
    rename_values,
    root_of,
    taken_names,
)
from vlm_export.graph.core.replace_uses import discard_nodes, place_behind, replace_uses
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
    _rename(model, dict(zip(find_values(model, names, function), names.values(), strict=True)))
    return len(names)


def _rename(model: ir.Model, names: dict[ir.Value, str]) -> None:
    by_graph: defaultdict[ir.Graph, dict[ir.Value, str]] = defaultdict(dict)
    for value, new in names.items():
        by_graph[graph_of(value)][value] = new
    by_root: defaultdict[ir.Graph, dict[ir.Value, str]] = defaultdict(dict)
    for graph, values in by_graph.items():
        root = root_of(model, graph)
        holders: defaultdict[str, set[ir.Value]] = defaultdict(set)
        for other in (other for related in related_graphs(root, graph) for other in defined_values(related)):
            holders[names.get(other, other.name or "")].add(other)
        for value, new in values.items():
            if not new:
                raise GraphError(f"tensor {value.name!r} needs a name", fix="give a name that is not empty")
            if holders[new] - {value}:
                raise GraphError(
                    f"a tensor is already named {new!r}", fix="choose another name, or rename that tensor too"
                )
        by_root[root].update(values)
    for root, values in by_root.items():
        rename_values(root, values)


def add_output(model: ir.Model, tensors: TensorRef | Sequence[TensorRef]) -> int:
    """Makes tensors of the main graph outputs, behind those that are there: a tap for debugging.

    Returns:
        How many outputs were added.

    Raises:
        GraphError: unknown, an output already, inside a subgraph or function, or of a type that cannot be told.
    """
    names = [tensors] if isinstance(tensors, str | ir.Value) else tensors
    values = list(dict.fromkeys(find_values(model, names)))
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


def drop_output(model: ir.Model, names: str | Sequence[str]) -> int:
    """Removes outputs of the model, and the nodes and constants that nothing needs any more.

    Returns:
        How many nodes were removed.

    Raises:
        GraphError: no such output, or none would be left.
    """
    graph = model.graph
    dropped = [
        interface_value(graph.outputs, "output", name) for name in ([names] if isinstance(names, str) else names)
    ]
    kept = [value for value in graph.outputs if value not in dropped]
    if not kept:
        raise GraphError("the model would have no output", got=f"outputs {[value.name for value in dropped]}")
    graph.outputs[:] = kept
    count, annotated = len(graph), annotated_names({graph_of(value) for value in dropped})
    waiting = list(dropped)
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        waiting += captured_or_read(node)
        discard_nodes([node], annotated)
    return count - len(graph)


def reorder_interface(
    model: ir.Model, *, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> None:
    """Puts the inputs, the outputs or both into the order of the names.

    Raises:
        GraphError: a name that is none of theirs, is missing, or occurs twice.
    """
    orders = []
    for kind, values, names in (("input", model.graph.inputs, inputs), ("output", model.graph.outputs, outputs)):
        order = list(values) if names is None else [interface_value(values, kind, name) for name in names]
        if len(order) != len(values) or len(set(order)) != len(set(values)):
            raise GraphError(
                f"the new order is not one of all {kind}s",
                expected=str([value.name for value in values]),
                got=str([value.name for value in order]),
                fix="name each of them once",
            )
        orders.append((values, order))
    for values, order in orders:
        values[:] = order


_USUAL_NAMES = {"float32": ir.DataType.FLOAT, "float64": ir.DataType.DOUBLE}
_NO_CAST = {ir.DataType.UNDEFINED, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}


def set_dtype(model: ir.Model, dtypes: Mapping[str, ir.DataType | str]) -> int:
    """Changes the dtypes of inputs and outputs; a Cast stands between each and the graph, which computes as before.

    Changing a dtype back removes the Cast that this function put there (it knows it by its name) and gives the original
    graph; Casts of the model's own stay, since they round. Weights and everything inside keep their dtypes.

    Args:
        dtypes: input or output → "float16", "int64", …

    Returns:
        How many inputs and outputs have another dtype than before.

    Raises:
        GraphError: no such input, output or dtype, one that is no tensor, one that is input and output at once, or a
            Cast that does not exist at the model's opset.
    """
    wanted = {_castable(model, name): dtype_of(dtype) for name, dtype in dtypes.items()}
    changed = {value: dtype for value, dtype in wanted.items() if value.dtype != dtype}

    def edit(copy: Copy) -> Change:
        nodes: list[ir.Node] = []
        for value, dtype in changed.items():
            cast = _cast_input if value.is_graph_input() else _cast_output
            nodes += cast(copy.model.graph, copy.of(value), dtype)
        values = [copy.of(value) for value in changed if value.is_graph_input()]
        return Change([node for node in nodes if node.graph is not None], values, keeps_sizes=True)

    apply(model, edit)
    return len(changed)


def dtype_of(name: ir.DataType | str) -> ir.DataType:
    """Returns the dtype of a name as numpy or ONNX has it ("float32", "FLOAT"); GraphError for another name."""
    if isinstance(name, ir.DataType):
        return name
    names = {entry.name.lower(): entry for entry in ir.DataType if entry not in _NO_CAST} | _USUAL_NAMES
    if name.lower() not in names:
        raise GraphError(f"unknown dtype {name!r}", fix=suggestion(name.lower(), names))
    return names[name.lower()]


def _castable(model: ir.Model, name: str) -> ir.Value:
    value = interface_value([*model.graph.outputs, *model.graph.inputs], "input or output", name)
    if value.is_graph_input() and value.is_graph_output():
        raise GraphError(f"tensor {name!r} is input and output at once", fix="insert an Identity for the output first")
    if not isinstance(value.type, ir.TensorType):
        raise GraphError(f"{name!r} is no tensor, or its dtype is not known", got=str(value.type))
    return value


def _cast(value: ir.Value, dtype: ir.DataType, graph: ir.Graph) -> ir.Node:
    base, shape = f"{value.name}_cast", None if value.shape is None else value.shape.copy()
    out = ir.val(fresh_name(base, taken_names(graph, graph)), dtype, shape)
    return ir.node("Cast", [value], {"to": dtype}, outputs=[out], name=fresh_node_name(graph, base))


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
    """Returns the nodes that read another dtype or are new."""
    assert value.dtype is not None
    old, readers = value.dtype, value.consumers()
    value.type = ir.TensorType(dtype, denotation=value.type.denotation if value.type is not None else None)
    if value.is_initializer() and (default := value.const_value) is not None:
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(default.numpy().astype(dtype.numpy()), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(default.shape.numpy()),
            name=default.name,
        )
    if not readers:
        return []
    if all(_is_own(node, value, dtype) and not node.outputs[0].is_graph_output() for node in readers):
        beyond = [user for node in readers for user in node.outputs[0].consumers()]
        for node in readers:
            replace_uses(node.outputs[0], value)
            discard_nodes([node])
        return beyond
    cast = _cast(value, old, graph)
    replace_uses(value, cast.outputs[0], besides=cast)
    place_behind(None, graph, cast)
    return [cast]


def _cast_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
    """Returns the nodes that are new."""
    producer, name = value.producer(), str(value.name)
    assert value.dtype is not None
    if producer is not None and _is_own(producer, value, value.dtype) and not value.uses():
        source = producer.inputs[0]
        maker = source.producer() if source is not None else None
        own = maker is not None and maker.graph is graph and source is not None and not source.is_graph_output()
        if source is not None and own and source.dtype == dtype:
            replace_uses(value, source)
            discard_nodes([producer])
            value.name = None
            rename_values(graph, {source: name})
            return []
    cast = _cast(value, dtype, graph)
    out, inner = cast.outputs[0], str(cast.outputs[0].name)
    graph.outputs[:] = [out if output is value else output for output in graph.outputs]
    rename_values(graph, {value: inner, out: name})
    if producer is not None:
        graph.insert_after(producer, cast)
    else:
        graph.append(cast)
    return [cast]


def _is_own(node: ir.Node, value: ir.Value, dtype: ir.DataType) -> bool:
    """Whether `set_dtype` put the node between the value and the graph."""
    casts = (node.domain, node.op_type) == ("", "Cast") and node.attributes.get_int("to") == dtype.value
    return casts and re.fullmatch(re.escape(f"{value.name}_cast") + r"(_\d+)?", node.name or "") is not None
