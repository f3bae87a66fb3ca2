"""Names and scopes: which graphs a model has, what a name stands for in each, and which names are free."""

from __future__ import annotations

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
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def nested_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yields the graph and all graphs inside it, outer ones first."""
    yield graph
    for node in graph:
        for subgraph in subgraphs_of(node):
            yield from nested_graphs(subgraph)


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


def defined_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yields what the graph itself defines, once each: inputs, initializers, named outputs of its nodes."""
    yield from graph.inputs
    for value in graph.initializers.values():
        if not value.is_graph_input():
            yield value
    for node in graph:
        for value in node.outputs:
            if value.name:
                yield value


def unbound_outputs(graph: ir.Graph) -> list[ir.Value]:
    """Returns outputs that only name something: nothing in the graph makes them (a subgraph that returns an outer
    value)."""
    return [
        value
        for value in graph.outputs
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer()
    ]


def names_in(graph: ir.Graph) -> set[str]:
    """Returns names of values that the graph defines or returns, without those of nested graphs."""
    return {str(value.name) for value in (*defined_values(graph), *graph.outputs)}


def parents_of(root: ir.Graph) -> dict[ir.Graph, ir.Node]:
    """Maps each nested graph to the node that holds it."""
    return {inner: node for graph in nested_graphs(root) for node in graph for inner in subgraphs_of(node)}


def enclosing_graphs(graph: ir.Graph, parents: dict[ir.Graph, ir.Node]) -> Iterator[ir.Graph]:
    """Yields the graph and those around it, inner ones first."""
    yield graph
    while graph in parents:
        outer = parents[graph].graph
        assert outer is not None
        graph = outer
        yield graph


def root_of(model: ir.Model, graph: ir.Graph) -> ir.Graph:
    """Returns the main graph or function body in which the graph lies; GraphError when it is not the model's."""
    for root in root_graphs(model):
        if any(inner is graph for inner in nested_graphs(root)):
            return root
    raise GraphError("the graph is not part of the model", got=str(graph.name))


def taken_names(root: ir.Graph, graph: ir.Graph) -> set[str]:
    """Names that a value of `graph` must not get: those of the graphs around it (they would be hidden), of its own,
    and of the graphs inside it (it would be hidden there)."""
    around = enclosing_graphs(graph, parents_of(root))
    return set().union(*map(names_in, {*around, *nested_graphs(graph)}))


def fresh_name(base: str, taken: set[str]) -> str:
    """`base`, or `base_1`, `base_2`, … where that is taken; the result is taken afterwards."""
    name, number = base, 0
    while not name or name in taken:
        number += 1
        name = f"{base or 'value'}_{number}"
    taken.add(name)
    return name


def fresh_node_name(root: ir.Graph, base: str) -> str:
    """Returns a name that no node of the scope has."""
    return fresh_name(base, {node.name for graph in nested_graphs(root) for node in graph if node.name})


def find_root(model: ir.Model, function: str = "") -> ir.Graph:
    """Returns the main graph, or the body of the function named `NAME` or `DOMAIN:NAME`.

    Raises:
        GraphError: no such function, or several.
    """
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
    if isinstance(tensor, ir.Value):
        if not any(value is tensor for graph in all_graphs(model) for value in defined_values(graph)):
            raise GraphError("the tensor is not part of the model", got=str(tensor.name))
        return tensor
    root = find_root(model, function)
    found: list[ir.Value] = []
    known: set[str] = set()
    for graph in nested_graphs(root):
        for value in defined_values(graph):
            known.add(str(value.name))
            if value.name == tensor and tensor:
                found.append(value)
        if found and graph is root:
            break
    return _only(found, "tensor", tensor, known)


def find_node(model: ir.Model, node: NodeRef, function: str = "") -> ir.Node:
    """Returns the node of that name, otherwise the node that makes the tensor of that name.

    Raises:
        GraphError: unknown, or several nodes have the name.
    """
    if isinstance(node, ir.Node):
        if not any(known is node for known in all_nodes(model)):
            raise GraphError("the node is not part of the model", got=str(node.name))
        return node
    root = find_root(model, function)
    nodes = [known for graph in nested_graphs(root) for known in graph]
    found = [known for known in nodes if node and known.name == node]
    found = found or [known for known in nodes if node and any(value.name == node for value in known.outputs)]
    names = {known.name or str(known.outputs[0].name) for known in nodes if known.name or known.outputs}
    return _only(found, "node", node, names | {str(value.name) for known in nodes for value in known.outputs})


def visible_value(graph: ir.Graph, root: ir.Graph, name: str) -> ir.Value:
    """Returns what a node of `graph` would read under that name: the innermost definition in the graph or around it.

    Raises:
        GraphError: nothing of that name is visible there.
    """
    known: set[str] = set()
    for scope in enclosing_graphs(graph, parents_of(root)):
        for value in defined_values(scope):
            if value.name == name:
                return value
            known.add(str(value.name))
    raise GraphError(f"no tensor {name!r} is visible in graph {graph.name!r}", fix=_suggestion(name, known))


def annotated_names(graphs: Iterable[ir.Graph]) -> set[str]:
    """Returns names of scales and zero points that quantization annotations of these graphs' values give: uses by
    name."""
    values = (value for graph in graphs for value in defined_values(graph))
    return {name for value in values for name in (value.meta.get(_QUANTIZATION_KEY) or {}).values()}


def rename_values(root: ir.Graph, names: dict[ir.Value, str]) -> None:
    """Gives values new names at once, also swapped ones, and to what refers to them by name: quantization annotations,
    and subgraphs that return an outer value. The names were checked before."""
    parents = parents_of(root)
    graphs = list(nested_graphs(root))
    visible = {graph: _visible(graph, parents) for graph in graphs}
    unbound = [(value, visible[graph].get(str(value.name))) for graph in graphs for value in unbound_outputs(graph)]
    for graph in graphs:
        for value in defined_values(graph):
            _rename_annotation(value, visible[graph], names)
    targets = names | {value: names[outer] for value, outer in unbound if outer in names}
    ir.convenience.rename_values(list(targets), list(targets.values()))


def _visible(graph: ir.Graph, parents: dict[ir.Graph, ir.Node]) -> dict[str, ir.Value]:
    scopes = reversed(list(enclosing_graphs(graph, parents)))
    return {str(value.name): value for scope in scopes for value in defined_values(scope)}


def _rename_annotation(value: ir.Value, visible: dict[str, ir.Value], names: dict[ir.Value, str]) -> None:
    annotation = value.meta.get(_QUANTIZATION_KEY)
    if annotation:
        value.meta[_QUANTIZATION_KEY] = {
            role: names.get(visible[name], name) if name in visible else name for role, name in annotation.items()
        }


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
    return text if len(choices) <= 20 or text.startswith("did") else "list the names with `graph show`"


def is_sorted(model: ir.Model) -> bool:
    """Tells whether every node stands behind what it reads, and what the graphs inside it read."""
    for graph in all_graphs(model):
        # Producers of this graph that stand further down than whoever reads them, also from inside a subgraph.
        position = {node: index for index, node in enumerate(graph)}
        for node, index in position.items():
            for value in captured_or_read(node):
                producer = value.producer()
                if producer is not None and position.get(producer, -1) >= index:
                    return False
    return True


def captured_or_read(node: ir.Node) -> list[ir.Value]:
    """Returns what a node reads, and what the graphs inside it read."""
    values = [value for value in node.inputs if value is not None]
    for graph in subgraphs_of(node):
        for inner in graph:
            values += captured_or_read(inner)
    return values


def opset_imports_of(model: ir.Model, root: ir.Graph) -> dict[str, int]:
    """Returns the opset imports (domain → version) that hold in the main graph or in a function's body."""
    for function in model.functions.values():
        if function.graph is root:
            return function.opset_imports
    return model.opset_imports


def scopes(model: ir.Model) -> Iterator[tuple[ir.Graph, int]]:
    """Yields every graph, with the version of ONNX's own operators that holds in it (0: not imported)."""
    for root in root_graphs(model):
        opset = root.opset_imports.get("", 0)
        for graph in nested_graphs(root):
            yield graph, opset


def names_used(model: ir.Model) -> set[str]:
    """Names of values with uses that the library does not know of: outer ones that a subgraph returns as they are, and
    scales and zero points of quantization annotations."""
    returned = {str(value.name) for graph in all_graphs(model) for value in unbound_outputs(graph)}
    return returned | annotated_names(all_graphs(model))
