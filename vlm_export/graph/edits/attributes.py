"""Attributes of nodes, of every type that ONNX has: set, replaced, deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from vlm_export.errors import GraphError, suggestion
from vlm_export.graph.core.inference import Copy
from vlm_export.graph.core.names import NodeRef, defined_values, find_node, nested_graphs, root_of, visible_value
from vlm_export.graph.core.operators import checked_schema
from vlm_export.graph.core.transaction import Change, apply

Kind = ir.AttributeType


def set_attribute(
    model: ir.Model,
    node: NodeRef,
    name: str,
    value: object,
    *,
    kind: ir.AttributeType | None = None,
    function: str = "",
) -> ir.Attr | None:
    """Sets an attribute of a node; types and shapes behind it are inferred anew.

    Args:
        node: its name, or that of a tensor that it makes.
        value: a number, text, array, graph, type, or a sequence of one of these; or a whole `ir.Attr`. A graph is
            copied; what it reads from outside is found by name.
        kind: the attribute's type. By default the operator's definition says it, then the attribute that is there,
            then the value.
        function: the node is in this function's body.

    Returns:
        The attribute of before, with which this function undoes the change; None when there was none.

    Raises:
        GraphError: unknown node or attribute, a value of another type, or a model that would be invalid.
    """
    target = find_node(model, node, function)
    graph = target.graph
    assert graph is not None
    root = root_of(model, graph)
    schema = checked_schema(model, root, target.op_type, target.domain)
    new = make_attribute(name, value, schema, kind, target.attributes.get(name))
    old = target.attributes.get(name)

    def edit(copy: Copy) -> Change:
        copy.of(target).attributes[name] = placed_attribute(new, copy.of(root), copy.of(graph))
        return Change(nodes=[copy.of(target)])

    apply(model, edit)
    if old is not None:
        _release(old)
    return old


def delete_attribute(model: ir.Model, node: NodeRef, name: str, *, function: str = "") -> ir.Attr:
    """Removes an attribute, so that its default holds; returns it.

    Raises:
        GraphError: unknown node or attribute, or one that the operator requires.
    """
    target = find_node(model, node, function)
    if name not in target.attributes:
        raise GraphError(
            f"node {target.name!r} has no attribute {name!r}",
            got=f"{target.op_type} with {sorted(target.attributes) or 'no attributes'}",
            fix=suggestion(name, sorted(target.attributes)),
        )
    old = target.attributes[name]

    def edit(copy: Copy) -> Change:
        del copy.of(target).attributes[name]
        return Change(nodes=[copy.of(target)])

    apply(model, edit)
    _release(old)
    return old


def make_attributes(values: Mapping[str, object] | None, schema: onnx.defs.OpSchema | None) -> list[ir.Attr]:
    """Makes attributes for a new node, each checked against the operator's definition."""
    return [make_attribute(name, value, schema) for name, value in (values or {}).items()]


def make_attribute(
    name: str,
    value: object,
    schema: onnx.defs.OpSchema | None,
    kind: ir.AttributeType | None = None,
    old: ir.Attr | None = None,
) -> ir.Attr:
    """Makes an attribute of the type that the definition, the old attribute, or the value has.

    Raises:
        GraphError: the operator has no such attribute, or the value is of another type.
    """
    if schema is not None and name not in schema.attributes:
        known = sorted(schema.attributes)
        raise GraphError(f"{schema.name} has no attribute {name!r}", fix=suggestion(name, known))
    stated = kind
    if schema is not None:
        stated = ir.AttributeType[str(schema.attributes[name].type).rpartition(".")[2]]
    elif stated is None and old is not None:
        stated = old.type
    if kind is not None and kind != stated:
        raise _wrong_type(name, stated, kind.name)
    if isinstance(value, ir.Attr):
        if value.name != name or (stated is not None and value.type != stated):
            raise _wrong_type(name, stated, str(value))
        return value
    stated = stated or _kind_of(name, value)
    try:
        return ir.Attr(name, stated, _converted(stated, value))
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong_type(name, stated, repr(value)[:200]) from error


def placed_attribute(attribute: ir.Attr, root: ir.Graph, graph: ir.Graph) -> ir.Attr:
    """Returns the attribute for a node of `graph`; graphs in it are copied, and read what their outer names mean
    there."""
    if attribute.is_ref() or attribute.type not in (Kind.GRAPH, Kind.GRAPHS):
        return attribute
    placed = [inner.clone(allow_outer_scope_values=True) for inner in _graphs_of(attribute)]
    for inner in placed:
        for node, index, value in _captures(inner):
            node.replace_input_with(index, visible_value(graph, root, str(value.name)))
    return ir.Attr(attribute.name, attribute.type, placed[0] if attribute.type == Kind.GRAPH else placed)


def _release(attribute: ir.Attr) -> None:
    """Lets the graphs of an attribute that left the model read stand-ins, or their nodes would remain readers."""
    stand_ins: dict[ir.Value, ir.Value] = {}
    for graph in _graphs_of(attribute):
        for node, index, value in _captures(graph):
            stand_in = stand_ins.setdefault(value, ir.Value(name=value.name, type=value.type, shape=value.shape))
            node.replace_input_with(index, stand_in)


def _graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref() or attribute.type not in (Kind.GRAPH, Kind.GRAPHS):
        return []
    return [attribute.as_graph()] if attribute.type == Kind.GRAPH else list(attribute.as_graphs())


def _captures(graph: ir.Graph) -> list[tuple[ir.Node, int, ir.Value]]:
    """Where nodes in the graph read what is made outside of it."""
    nodes = [node for inner in nested_graphs(graph) for node in inner]
    own = {value for inner in nested_graphs(graph) for value in defined_values(inner)}
    reads = ((node, index, value) for node in nodes for index, value in enumerate(node.inputs))
    return [(node, index, value) for node, index, value in reads if value is not None and value not in own]


def _kind_of(name: str, value: object) -> ir.AttributeType:
    # A graph is a sequence of nodes, too.
    plural = isinstance(value, Sequence) and not isinstance(value, str | bytes | ir.Graph)
    items: list[object] = list(value) if isinstance(value, Sequence) and plural else [value]
    for kind, (types, _) in _FORMS.items():
        if items and all(isinstance(item, types) for item in items):
            return ir.AttributeType[f"{kind.name}S"] if plural else kind
    raise GraphError(
        f"the type of attribute {name!r} cannot be told from its value", got=repr(value)[:200], fix="state its type"
    )


def _wrong_type(name: str, stated: ir.AttributeType | None, got: str) -> GraphError:
    return GraphError(f"attribute {name!r} has another type", expected=stated.name if stated else "", got=got)


def _converted(kind: ir.AttributeType, value: Any) -> Any:
    """The value as `ir.Attr` wants it; TypeError or ValueError where it is of another kind."""
    if kind not in _FORMS:
        if isinstance(value, str | bytes) or not kind.name.endswith("S"):
            raise TypeError
        return tuple(_converted(ir.AttributeType[kind.name.removesuffix("S")], item) for item in value)
    types, convert = _FORMS[kind]
    if not isinstance(value, types) or (kind == Kind.FLOAT and isinstance(value, bool)):
        raise TypeError
    return convert(value)


def _integer(value: Any) -> int:
    if not -(1 << 63) <= int(value) < 1 << 63:
        raise ValueError
    return int(value)


# Kind of attribute → what it is made from, and how. Whole numbers come before others, for they are real, too.
_FORMS: Mapping[ir.AttributeType, tuple[Any, Callable[[Any], Any]]] = {
    Kind.INT: (Integral, _integer),
    Kind.FLOAT: (Real, float),
    Kind.STRING: ((str, bytes), lambda text: text.decode("utf-8") if isinstance(text, bytes) else text),
    Kind.GRAPH: (ir.Graph, lambda graph: graph),
    Kind.TYPE_PROTO: (ir.TypeAndShape, lambda kind: kind),
    Kind.TENSOR: (
        (np.ndarray, np.generic, ir.TensorProtocol),
        lambda tensor: tensor if isinstance(tensor, ir.TensorProtocol) else ir.tensor(np.asarray(tensor)),
    ),
}
