"""Names and scopes: which graphs a model has, what a name stands for in each, and which names are free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeAlias, TypeVar

import onnx_ir as ir

from vlm_export.errors import GraphError, suggestion

# How operations are told what to change: by name, or by the object itself.
TensorRef: TypeAlias = "str | ir.Value"
NodeRef: TypeAlias = "str | ir.Node"
_Found = TypeVar("_Found")

# Where onnx_ir keeps the names of scale and zero point of a quantised tensor: names, not values.
_QUANTIZATION_KEY = "quant_parameter_tensor_names"


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Yields the graphs in a node's attributes, one level deep."""
    for attribute in node.attributes.values():
        yield from graphs_in(attribute)


def graphs_in(attribute: ir.Attr) -> list[ir.Graph]:
    """Returns the graphs that an attribute holds; none where a function's caller sets it."""
    if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return []
    return [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else list(attribute.as_graphs())


def nested_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yields the graph and all graphs inside it, outer ones first."""
    yield graph
    for node in graph:
        for subgraph in subgraphs_of(node):
            yield from nested_graphs(subgraph)


def nested_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yields the nodes of the graph and of all graphs inside it."""
    for inner in nested_graphs(graph):
        yield from inner


def nested_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yields what the graph and all graphs inside it define."""
    for inner in nested_graphs(graph):
        yield from defined_values(inner)


def root_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yields the main graph and the body of each function: scopes that see nothing of one another."""
    yield model.graph
    for function in model.functions.values():
        yield function.graph


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yields every graph of the model: main graph, function bodies, and what is nested in them."""
    for root in root_graphs(model):
        yield from nested_graphs(root)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yields every node of every graph."""
    for graph in all_graphs(model):
        yield from graph


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Yields what every graph defines."""
    for graph in all_graphs(model):
        yield from defined_values(graph)


def defined_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yields what the graph itself defines, once each: inputs, initializers, named outputs of its nodes."""
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    yield from (value for node in graph for value in node.outputs if value.name)


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Returns what the node itself reads, without inputs that it leaves out."""
    return [value for value in node.inputs if value is not None]


def captured_or_read(node: ir.Node) -> list[ir.Value]:
    """Returns what a node reads, and what the graphs inside it read."""
    inner = (entry for graph in subgraphs_of(node) for entry in nested_nodes(graph))
    return [value for entry in (node, *inner) for value in inputs_of(entry)]


def graph_of(item: ir.Node | ir.Value) -> ir.Graph:
    """Returns the graph that has the node, or defines the value."""
    graph = item.graph
    assert graph is not None
    return graph


def unbound_outputs(graph: ir.Graph) -> list[ir.Value]:
    """Returns outputs that nothing in the graph makes: a subgraph may return an outer value."""
    return [
        value
        for value in graph.outputs
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer()
    ]


def names_in(graph: ir.Graph) -> set[str]:
    """Returns names of values that the graph defines or returns, without those of nested graphs."""
    return {str(value.name) for value in (*defined_values(graph), *graph.outputs)}


def _parents_of(root: ir.Graph) -> dict[ir.Graph, ir.Graph]:
    """Maps each nested graph to the graph around it."""
    return {inner: graph for graph in nested_graphs(root) for node in graph for inner in subgraphs_of(node)}


def enclosing_graphs(root: ir.Graph, graph: ir.Graph) -> list[ir.Graph]:
    """Returns the graph and those around it, inner ones first."""
    parents, found = _parents_of(root), [graph]
    while found[-1] in parents:
        found.append(parents[found[-1]])
    return found


def root_of(model: ir.Model, graph: ir.Graph) -> ir.Graph:
    """Returns the main graph or function body in which the graph lies; GraphError when it is not the model's."""
    for root in root_graphs(model):
        if any(inner is graph for inner in nested_graphs(root)):
            return root
    raise GraphError("the graph is not part of the model", got=str(graph.name))


def related_graphs(root: ir.Graph, graph: ir.Graph) -> set[ir.Graph]:
    """Returns graphs whose names meet those of `graph`: the ones around it, itself, and the ones inside it."""
    return {*enclosing_graphs(root, graph), *nested_graphs(graph)}


def taken_names(root: ir.Graph, graph: ir.Graph) -> set[str]:
    """Returns names that a new value of `graph` must not get: it would hide another one, or be hidden."""
    return set().union(*map(names_in, related_graphs(root, graph)))


def fresh_name(base: str, taken: set[str]) -> str:
    """Returns `base`, or `base_1`, `base_2`, … where that is taken; the result is taken afterwards."""
    name, number = base, 0
    while not name or name in taken:
        number += 1
        name = f"{base or 'value'}_{number}"
    taken.add(name)
    return name


def fresh_node_name(root: ir.Graph, base: str) -> str:
    """Returns a name that no node of the scope has."""
    return fresh_name(base, {node.name for node in nested_nodes(root) if node.name})


def find_root(model: ir.Model, function: str = "") -> ir.Graph:
    """Returns the main graph, or the one function's body named `NAME` or `DOMAIN:NAME`; GraphError without one."""
    if not function:
        return model.graph
    known = {f"{entry.domain}:{entry.name}": entry for entry in model.functions.values()}
    matches = [entry for name, entry in known.items() if function in (name, entry.name)]
    if len(matches) == 1:
        return matches[0].graph
    what = f"several functions are named {function!r}" if matches else f"the model has no function {function!r}"
    raise GraphError(what, expected="NAME or DOMAIN:NAME", fix=_suggestion(function, known))


def find_value(model: ir.Model, tensor: TensorRef, function: str = "") -> ir.Value:
    """Returns the value of that name: of the main graph, otherwise of the one nested graph that defines it.

    Args:
        tensor: its name; a value is checked to be the model's and returned.
        function: look inside this function's body instead.

    Raises:
        GraphError: unknown, or defined in several nested graphs and in none around them.
    """
    return find_values(model, [tensor], function)[0]


def find_values(model: ir.Model, tensors: Iterable[TensorRef], function: str = "") -> list[ir.Value]:
    """`find_value` of each; the model is walked once for all of them."""
    root = find_root(model, function)
    own: defaultdict[str, list[ir.Value]] = defaultdict(list)
    nested: defaultdict[str, list[ir.Value]] = defaultdict(list)
    for graph in nested_graphs(root):
        for value in defined_values(graph):
            (own if graph is root else nested)[value.name or ""].append(value)
    members: set[ir.Value] = set()
    found: list[ir.Value] = []
    for tensor in tensors:
        if isinstance(tensor, ir.Value):
            members = members or set(all_values(model))
            if tensor not in members:
                raise GraphError("the tensor is not part of the model", got=str(tensor.name))
            found.append(tensor)
        else:
            candidates = (own.get(tensor) or nested.get(tensor) or []) if tensor else []
            found.append(_only(candidates, "tensor", tensor, own.keys() | nested.keys()))
    return found


def find_node(model: ir.Model, node: NodeRef, function: str = "") -> ir.Node:
    """Returns the one node of that name, or the one that makes the tensor of that name; GraphError without one."""
    if isinstance(node, ir.Node):
        if not any(known is node for known in all_nodes(model)):
            raise GraphError("the node is not part of the model", got=str(node.name))
        return node
    nodes = list(nested_nodes(find_root(model, function)))
    found = [known for known in nodes if node and known.name == node]
    found = found or [known for known in nodes if node and any(value.name == node for value in known.outputs)]
    names = {known.name for known in nodes if known.name}
    return _only(found, "node", node, names | {str(value.name) for known in nodes for value in known.outputs})


def _visible_values(root: ir.Graph, graph: ir.Graph) -> dict[str, ir.Value]:
    """What a node of `graph` reads under each name: definitions of inner graphs hide those of outer ones."""
    scopes = reversed(enclosing_graphs(root, graph))
    return {str(value.name): value for scope in scopes for value in defined_values(scope)}


def visible_value(graph: ir.Graph, root: ir.Graph, name: str) -> ir.Value:
    """Returns what a node of `graph` would read under that name; GraphError where nothing has it."""
    known = _visible_values(root, graph)
    if name not in known:
        raise GraphError(f"no tensor {name!r} is visible in graph {graph.name!r}", fix=_suggestion(name, known))
    return known[name]


def annotated_names(graphs: Iterable[ir.Graph]) -> set[str]:
    """Returns names of scales and zero points in quantization annotations of these graphs' values: uses by name."""
    values = (value for graph in graphs for value in defined_values(graph))
    return {name for value in values for name in (value.meta.get(_QUANTIZATION_KEY) or {}).values()}


def rename_values(root: ir.Graph, names: dict[ir.Value, str]) -> None:
    """Gives values new names at once, also swapped ones, and to what refers to them by name: quantization annotations,
    and subgraphs that return an outer value. The names were checked before."""
    targets = dict(names)
    for graph in nested_graphs(root):
        renamed = {name: names[value] for name, value in _visible_values(root, graph).items() if value in names}
        targets |= {value: renamed[value.name] for value in unbound_outputs(graph) if value.name in renamed}
        for value in defined_values(graph):
            if annotation := value.meta.get(_QUANTIZATION_KEY):
                value.meta[_QUANTIZATION_KEY] = {role: renamed.get(name, name) for role, name in annotation.items()}
    ir.convenience.rename_values(list(targets), list(targets.values()))


def interface_value(values: Iterable[ir.Value], kind: str, name: str) -> ir.Value:
    """Returns the input or output (`kind`) of that name; GraphError with the nearest name where there is none."""
    known = {str(value.name): value for value in values}
    if name not in known:
        raise GraphError(f"the model has no {kind} {name!r}", fix=suggestion(name, known))
    return known[name]


def _only(found: list[_Found], kind: str, name: str, known: Iterable[str]) -> _Found:
    if len(found) == 1:
        return found[0]
    if not found:
        raise GraphError(f"the model has no {kind} {name!r}", fix=_suggestion(name, known))
    raise GraphError(
        f"{kind} {name!r} is not unique",
        got=f"{len(found)} {kind}s of that name",
        fix="name a node by a tensor that it makes, or pass the object itself from Python",
    )


def _suggestion(name: str, known: Iterable[str]) -> str:
    """As `suggestion`, but of long lists only the nearest name."""
    choices = sorted(known)
    text = suggestion(name, choices)
    return text if len(choices) <= 20 or text.startswith("did") else "list the names with `graph find IN '*'`"


def is_sorted(model: ir.Model) -> bool:
    """Tells whether every node stands behind what it reads, and what the graphs inside it read."""
    for graph in all_graphs(model):
        # Producers of this graph that stand further down than whoever reads them, also from inside a subgraph.
        position = {node: index for index, node in enumerate(graph)}
        for node, index in position.items():
            producers = (value.producer() for value in captured_or_read(node))
            if any(producer is not None and position.get(producer, -1) >= index for producer in producers):
                return False
    return True


def names_used(model: ir.Model) -> set[str]:
    """Returns names of values with uses that the library does not know of: outer ones that a subgraph returns as they
    are, and scales and zero points of quantization annotations."""
    returned = {str(value.name) for graph in all_graphs(model) for value in unbound_outputs(graph)}
    return returned | annotated_names(all_graphs(model))
