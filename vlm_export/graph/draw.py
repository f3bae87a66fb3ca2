"""A picture of a part of a graph: an SVG of layers, one below the other, drawn without any other tool."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import captured_or_read, find_value
from vlm_export.graph.core.tensors import constant_tensor
from vlm_export.graph.layered_svg import Box, Edge, layered_svg
from vlm_export.graph.look.show import operator_name, type_text

MAX_NODES = 400


def draw_graph(
    model: ir.Model, start: Sequence[str] = (), end: Sequence[str] = (), *, distance: int | None = None
) -> str:
    """An SVG of the nodes of the main graph between tensors.

    Args:
        start: tensors where the picture begins; none: wherever `end` comes from.
        end: tensors where it ends; none: all that follows from `start`.
        distance: at most so many nodes from the given tensors.

    Raises:
        GraphError: an unknown tensor, nothing between them, or more than 400 nodes.
    """
    starts = [_main_tensor(model, name) for name in start]
    ends = [_main_tensor(model, name) for name in end]
    nodes = _nodes_between(model.graph, starts, ends, distance)
    if not nodes:
        raise GraphError("there are no nodes between these tensors", got=f"from {list(start)} to {list(end)}")
    if len(nodes) > MAX_NODES:
        raise GraphError(
            "the picture would be too large to read",
            expected=f"at most {MAX_NODES} nodes",
            got=f"{len(nodes)} nodes",
            fix="name tensors closer together (--from, --to), or a --distance",
        )
    boxes, edges = _boxes(model.graph, nodes)
    return layered_svg(boxes, edges)


def _main_tensor(model: ir.Model, name: str) -> ir.Value:
    value = find_value(model, name)
    producer = value.producer()
    if (value.graph if producer is None else producer.graph) is not model.graph:
        raise GraphError(f"tensor {name!r} is inside a subgraph", fix="name a tensor of the main graph")
    return value


def _nodes_between(
    graph: ir.Graph, starts: Sequence[ir.Value], ends: Sequence[ir.Value], distance: int | None
) -> list[ir.Node]:
    position = {node: index for index, node in enumerate(graph)}
    below = _reach(starts, distance, position, down=True) if starts else None
    above = _reach(ends, distance, position, down=False) if ends else None
    if below is None or above is None:
        chosen = below if below is not None else above
        return [node for node in graph if chosen is None or node in chosen]
    return [node for node in graph if node in below and node in above]


def _reach(values: Sequence[ir.Value], distance: int | None, position: dict[ir.Node, int], down: bool) -> set[ir.Node]:
    found: dict[ir.Node, int] = {}
    waiting = deque((value, 1) for value in values)
    while waiting:
        value, steps = waiting.popleft()
        if distance is not None and steps > distance:
            continue
        for node in _readers(value, position) if down else _makers(value):
            if node in position and node not in found:
                found[node] = steps
                next_values = node.outputs if down else captured_or_read(node)
                waiting.extend((entry, steps + 1) for entry in next_values)
    return set(found)


def _makers(value: ir.Value) -> list[ir.Node]:
    producer = value.producer()
    return [] if producer is None else [producer]


def _readers(value: ir.Value, position: dict[ir.Node, int]) -> list[ir.Node]:
    """Nodes of the main graph that read a tensor, by themselves or inside."""
    users = {user for user, _ in value.uses()}
    if users <= position.keys():
        return list(users)
    return [node for node in position if node in users or value in captured_or_read(node)]


def _boxes(graph: ir.Graph, nodes: Sequence[ir.Node]) -> tuple[list[Box], list[Edge]]:
    inside, tensors, edges = set(nodes), dict[ir.Value, Box](), list[Edge]()
    for node in nodes:
        for value in dict.fromkeys(captured_or_read(node)):
            producer = value.producer()
            if producer is not None and producer in inside:
                edges.append(Edge(producer, node, _label(value)))
            elif constant_tensor(value) is None and (producer is None or producer.graph is graph):
                tensors.setdefault(value, _tensor_box(value, "input" if value.is_graph_input() else "outside"))
                edges.append(Edge(value, node, _label(value)))
        for value in node.outputs:
            leaves = any(user not in inside and user.graph is graph for user, _ in value.uses())
            if value.is_graph_output() or leaves:
                tensors[value] = _tensor_box(value, "output" if value.is_graph_output() else "outside")
                edges.append(Edge(node, value, _label(value)))
    return [*tensors.values(), *map(_node_box, nodes)], edges


def _label(value: ir.Value) -> str:
    return f"{value.name}: {type_text(value)}"


def _tensor_box(value: ir.Value, style: str) -> Box:
    return Box(value, (_short(str(value.name)), type_text(value)), style, str(value.name))


def _node_box(node: ir.Node) -> Box:
    constants = [value for value in node.inputs if value is not None and constant_tensor(value) is not None]
    lines = [operator_name(node), *(_short(f"{value.name} {type_text(value)}") for value in constants[:3])]
    lines += [_short(_attribute_text(attribute)) for attribute in list(node.attributes.values())[:4]]
    return Box(node, tuple(lines), "node", node.name or "")


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"{attribute.name}=@{attribute.ref_attr_name}"
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return f"{attribute.name}: graph"
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return f"{attribute.name}: tensor"
    return f"{attribute.name}={attribute.value}"


def _short(text: str, length: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
