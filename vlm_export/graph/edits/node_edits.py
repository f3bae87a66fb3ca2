"""Nodes removed, inserted and replaced: whoever read a tensor goes on reading the right one, wherever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from vlm_export.errors import GraphError, UsageError
from vlm_export.graph.core.inference import Copy
from vlm_export.graph.core.names import (
    NodeRef,
    TensorRef,
    defined_values,
    find_node,
    find_root,
    find_value,
    fresh_name,
    fresh_node_name,
    nested_graphs,
    rename_values,
    root_of,
    taken_names,
)
from vlm_export.graph.core.operators import checked_schema
from vlm_export.graph.core.replace_uses import (
    Operand,
    add_constant_node,
    add_initializer,
    check_new_name,
    discard_nodes,
    graph_of,
    place_first,
    replace_uses,
    resolve_operand,
)
from vlm_export.graph.core.transaction import Change, apply
from vlm_export.graph.edits.attributes import make_attributes, placed_attribute


def remove_node(model: ir.Model, node: NodeRef, *, connect: Mapping[str, str] | None = None, function: str = "") -> int:
    """Removes a node; those that read an output of it read one of its inputs instead.

    An output of the graph keeps its name: the input takes it over, or, where the input has a name of its own to keep
    (an input, initializer or output of the graph, a tensor from outside a subgraph), an Identity makes it. Constants
    that only this node read are removed with it.

    Args:
        node: its name, or that of a tensor that it makes.
        connect: output → input that takes its place; by default the first input takes the first output's.
        function: the node is in this function's body.

    Returns:
        How many readers and graph outputs were connected anew.

    Raises:
        GraphError: an unknown name, an output that is read and has no input in its place, an output of the graph that
            would change its dtype, or dtypes or shapes that do not fit behind the node.
    """
    target = find_node(model, node, function)
    assert target.graph is not None
    root = root_of(model, target.graph)
    pairs = _connections(target, connect)
    count = sum(len(out.uses()) + sum(item is out for item in target.graph.outputs) for out, _ in pairs)

    def edit(copy: Copy) -> Change:
        old = copy.of(target)
        nodes: list[ir.Node] = []
        for out, source in ((copy.of(out), copy.of(source)) for out, source in pairs):
            if out.type != source.type or out.shape != source.shape:
                nodes += out.consumers()
            nodes += _reconnect(copy.of(root), old, out, source)
        discard_nodes([old])
        return Change(nodes, unsure={value for node in nodes for value in node.outputs})

    apply(model, edit)
    return count


def _connections(node: ir.Node, connect: Mapping[str, str] | None) -> list[tuple[ir.Value, ir.Value]]:
    outputs = {str(value.name): value for value in node.outputs if value.name}
    inputs = {str(value.name): value for value in node.inputs if value is not None}
    used = {name for name, value in outputs.items() if value.uses() or value.is_graph_output()}
    if connect is None:
        first = node.inputs[0] if node.inputs else None
        connect = {str(node.outputs[0].name): str(first.name)} if first is not None and node.outputs else {}
    for kind, names, known in (("output", connect.keys(), outputs), ("input", connect.values(), inputs)):
        for name in names:
            if name not in known:
                raise GraphError(f"node {node.name!r} has no {kind} {name!r}", got=f"{kind}s {sorted(known)}")
    if used - connect.keys():
        raise GraphError(
            f"node {node.name!r} makes tensors that are read and that no input replaces",
            got=f"outputs {sorted(used - connect.keys())}; inputs {sorted(inputs)}",
            fix="say which input takes the place of which output",
        )
    pairs = [(outputs[name], inputs[source]) for name, source in connect.items() if name in used]
    for out, source in pairs:
        if out.is_graph_output() and None not in (out.dtype, source.dtype) and out.dtype != source.dtype:
            raise GraphError(
                f"the graph's output {out.name!r} would change its dtype",
                expected=str(out.dtype),
                got=f"{source.dtype} of {source.name!r}",
                fix="replace the node instead, or change the output's dtype first",
            )
    return pairs


def _reconnect(root: ir.Graph, node: ir.Node, out: ir.Value, source: ir.Value) -> list[ir.Node]:
    """Puts `source` in the place of `out`; returns nodes whose outputs are new or want a type."""
    graph = node.graph
    assert graph is not None
    if not out.is_graph_output():
        replace_uses(out, source)
        return []
    name, producer = str(out.name), source.producer()
    if producer is not None and producer.graph is graph and not source.is_graph_output():
        replace_uses(out, source)
        out.name = None
        rename_values(root, {source: name})
        # An output states its type; where only the old one did, the new one is inferred.
        known, source.type = source.type, source.type or out.type
        return [] if known is not None else [producer]
    identity = ir.node("Identity", [source], num_outputs=1, name=fresh_node_name(root, f"{node.name or name}_identity"))
    new = identity.outputs[0]
    new.name, new.type, new.shape = name, out.type, out.shape
    replace_uses(out, new)
    out.name = None
    graph.insert_before(node, identity)
    return [identity]


def insert_node(
    model: ir.Model,
    op_type: str,
    *,
    after: TensorRef | NodeRef | None = None,
    before: NodeRef | None = None,
    input_index: int = 0,
    inputs: Sequence[Operand] = (),
    attributes: Mapping[str, object] | None = None,
    domain: str = "",
    name: str = "",
    output: str = "",
    function: str = "",
) -> ir.Node:
    """Puts a node of one output behind a tensor, or on one input of a node.

    Args:
        after: a tensor, or a node for its first output: all that read it, in subgraphs too, read the new node's output,
            and an output of the graph keeps its name.
        before: a node: only its input number `input_index` reads the new node's output.
        inputs: of the new node behind the first, which is the tensor: names, arrays (they become initializers), or
            None or "" for optional ones that are left out.
        name: of the node; by default made from the tensor's.
        output: name of the new tensor: what the node makes, or, behind an output of the graph, what it reads.
        function: look inside this function's body.

    Returns:
        The node.

    Raises:
        UsageError: not exactly one of `after` and `before`.
        GraphError: an unknown name, operator or attribute, a taken name, a cycle, dtypes or shapes that do not fit, or
            a tensor that is input and output of the graph at once.
    """
    source, reader = _insertion_point(model, after, before, input_index, function)
    graph = reader.graph if reader is not None else graph_of(source)
    assert graph is not None
    root = root_of(model, graph)
    if output:
        check_new_name(root, graph, output)
    operands = [resolve_operand(root, graph, operand) for operand in inputs]
    new_attributes = make_attributes(attributes, checked_schema(model, root, op_type, domain))
    node_name = fresh_node_name(root, name or f"{source.name}_{op_type}")
    made: list[ir.Node] = []

    def edit(copy: Copy) -> Change:
        tensor, place = copy.of(source), copy.of(graph)
        arguments = _arguments(copy, root, place, operands, node_name)
        placed = [placed_attribute(attribute, copy.of(root), place) for attribute in new_attributes]
        node = ir.Node(domain, op_type, [tensor, *arguments], placed, num_outputs=1, name=node_name)
        new_name = output or fresh_name(f"{tensor.name}_{op_type}", taken_names(copy.of(root), place))
        _connect(copy.of(root), place, node, new_name, None if reader is None else (copy.of(reader), input_index))
        made.append(node)
        return Change([node], unsure=node.outputs)

    apply(model, edit)
    return made[-1]


def _insertion_point(
    model: ir.Model, after: TensorRef | NodeRef | None, before: NodeRef | None, index: int, function: str
) -> tuple[ir.Value, ir.Node | None]:
    """The tensor that the new node reads, and its one reader if there shall be one."""
    if (after is None) == (before is None):
        raise UsageError("a node is inserted after a tensor or before a node", fix="give one of `after` and `before`")
    if before is not None:
        reader = find_node(model, before, function)
        return _input_of(reader, index), reader
    source = _tensor_after(model, after, function)
    if source.is_graph_output() and source.is_graph_input():
        raise GraphError(
            f"tensor {source.name!r} is input and output of the graph at once",
            fix="rename the output by removing it and adding another, or insert before a reader",
        )
    return source, None


def _connect(root: ir.Graph, graph: ir.Graph, node: ir.Node, new_name: str, edge: tuple[ir.Node, int] | None) -> None:
    """Puts a node that reads a tensor between it and its readers, or on the one edge."""
    tensor, out = node.inputs[0], node.outputs[0]
    assert tensor is not None
    out.name, out.type, out.shape = new_name, tensor.type, tensor.shape
    producer = tensor.producer()
    if edge is not None:
        graph.insert_before(edge[0], node)
        edge[0].replace_input_with(edge[1], out)
        return
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        place_first(graph, node)
    is_output = tensor.is_graph_output()
    replace_uses(tensor, out, besides=node)
    if is_output:
        rename_values(root, {tensor: new_name, out: str(tensor.name)})


def _input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if 0 <= index < len(node.inputs) else None
    if value is None:
        raise GraphError(f"node {node.name!r} has no input number {index}", got=f"{len(node.inputs)} inputs")
    return value


def _tensor_after(model: ir.Model, after: TensorRef | NodeRef | None, function: str) -> ir.Value:
    """The tensor of that name, otherwise the first output of the node of that name."""
    assert after is not None
    root = find_root(model, function)
    is_tensor = any(value.name == after for graph in nested_graphs(root) for value in defined_values(graph))
    if isinstance(after, ir.Value) or (isinstance(after, str) and is_tensor):
        return find_value(model, after, function)
    return find_node(model, after, function).outputs[0]


def _arguments(
    copy: Copy, root: ir.Graph, graph: ir.Graph, operands: Sequence[ir.Value | ir.TensorProtocol | None], base: str
) -> list[ir.Value | None]:
    """Operands of a new node in `graph` of the copy; constants become its own."""
    arguments: list[ir.Value | None] = []
    for index, operand in enumerate(operands):
        if operand is None or isinstance(operand, ir.Value):
            arguments.append(None if operand is None else copy.of(operand))
            continue
        name = fresh_name(f"{base}_input_{index}", taken_names(copy.of(root), graph))
        if copy.of(root) is copy.model.graph:
            arguments.append(add_initializer(graph, operand, name))
        else:
            arguments.append(add_constant_node(graph[0], operand, name))
    return arguments


def replace_node(
    model: ir.Model,
    node: NodeRef,
    op_type: str,
    *,
    inputs: Sequence[Operand] | None = None,
    attributes: Mapping[str, object] | None = None,
    domain: str = "",
    name: str = "",
    function: str = "",
) -> ir.Node:
    """Puts another operator in the place of a node; its outputs keep their names and readers.

    Args:
        node: its name, or that of a tensor that it makes.
        inputs: all of the new node's, as in `insert_node`; by default those of the old one.
        attributes: all of the new node's.
        name: of the new node; by default the old one's.
        function: the node is in this function's body.

    Returns:
        The new node.

    Raises:
        GraphError: an unknown name, operator or attribute, more outputs in use than the operator has, a cycle, or
            dtypes or shapes that do not fit behind it.
    """
    target = find_node(model, node, function)
    graph = target.graph
    assert graph is not None
    root = root_of(model, graph)
    schema = checked_schema(model, root, op_type, domain)
    given = list(target.inputs) if inputs is None else [resolve_operand(root, graph, item) for item in inputs]
    new_attributes = make_attributes(attributes, schema)
    count = _output_count(target, schema.max_output if schema is not None else len(target.outputs), op_type)
    node_name = fresh_node_name(root, name) if name and name != target.name else str(target.name or "")
    made: list[ir.Node] = []

    def edit(copy: Copy) -> Change:
        old = copy.of(target)
        arguments = _arguments(copy, root, copy.of(graph), given, node_name or op_type)
        placed = [placed_attribute(attribute, copy.of(root), copy.of(graph)) for attribute in new_attributes]
        new = ir.Node(domain, op_type, arguments, placed, num_outputs=count, name=node_name)
        for old_out, new_out in zip(old.outputs, new.outputs, strict=False):
            new_out.name, new_out.type, new_out.shape = old_out.name, old_out.type, old_out.shape
            replace_uses(old_out, new_out)
        copy.of(graph).insert_before(old, new)
        discard_nodes([old])
        made.append(new)
        return Change([new])

    apply(model, edit)
    return made[-1]


def _output_count(node: ir.Node, most: int, op_type: str) -> int:
    """As many outputs as the old node has, or as the operator can have if those beyond are not used."""
    used = [index for index, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    needed = max(used, default=0) + 1
    if needed > most:
        raise GraphError(
            f"{op_type} makes fewer tensors than are read of node {node.name!r}",
            expected=f"{needed} outputs",
            got=f"at most {most}",
        )
    return min(len(node.outputs), most)
