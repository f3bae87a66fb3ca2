"""Parts of a model as models: what lies between tensors, and a model cut in two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.dead_code import remove_unused_initializers
from vlm_export.graph.core.inference import Copy, copy_of, known_infos
from vlm_export.graph.core.names import (
    captured_or_read,
    find_values,
    fresh_name,
    graph_of,
    rename_values,
    taken_names,
)
from vlm_export.graph.core.replace_uses import discard_nodes, remove_unused_functions, replace_uses
from vlm_export.graph.core.skeleton import allow_plain_initializers


@dataclass(frozen=True)
class Split:
    """Two models that `compose` puts together again.

    Attributes:
        first: makes the cut tensors, and those outputs that lie before them.
        second: makes the other outputs, from the cut tensors and those inputs that it needs itself.
        connections: output of the first, input of the second.
        shared_inputs: what both read.
        inputs: those of the whole that either needs, in its order.
        outputs: those of the whole, in its order.
    """

    first: ir.Model
    second: ir.Model
    connections: tuple[tuple[str, str], ...]
    shared_inputs: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def extract(model: ir.Model, inputs: Sequence[str] | None, outputs: Sequence[str]) -> ir.Model:
    """Makes a model of what lies between tensors. Weights are shared with the original, which stays as it is.

    Initializers, functions, types, shapes and named axes that are needed come along, and all opset imports.

    Args:
        inputs: tensors of the main graph that become the inputs, in this order; None: those inputs of the model that
            the outputs need.
        outputs: tensors of the main graph that become the outputs.

    Raises:
        GraphError: an unknown tensor, one of a subgraph or function, an input that the outputs do not need, an input of
            the model that they need besides, or a tensor whose dtype cannot be told.
    """
    ends = _main_values(model, outputs)
    if inputs is None:
        _, read = _between([], ends)
        starts = [value for value in model.graph.inputs if value in read or value in ends]
    else:
        starts = _main_values(model, inputs)
    for kind, values in (("input", starts), ("output", ends)):
        if len(set(values)) < len(values) or (not values and kind == "output"):
            what = f"each {kind} is named once, and there is at least one output"
            raise GraphError(what, got=str(_names(values)))
    nodes, sources = _between(starts, ends)
    unused = _names(value for value in starts if value not in sources and value not in ends)
    if unused and inputs is not None:
        raise GraphError("the outputs do not depend on these inputs", got=str(unused), fix="leave them out")
    needed = {value for value in sources if value.is_graph_input() and not value.is_initializer()}
    missing = sorted(_names(needed.difference(starts)))
    if missing:
        raise GraphError(
            "the outputs need more inputs of the model",
            expected=f"inputs {_names(starts)}",
            got=f"also needed: {missing}",
            fix="add them to the inputs, or cut further down",
        )
    copy = copy_of(model)
    for value, info in known_infos(model, [*starts, *ends]).items():
        copy.of(value).type, copy.of(value).shape = info.type, info.shape
    _cut(copy, starts, ends, nodes)
    return copy.model


def split(model: ir.Model, tensors: Sequence[str]) -> Split:
    """Cuts a model at tensors: what makes them, and all the rest.

    Raises:
        GraphError: an unknown tensor, or one of a subgraph; an input or initializer; tensors that do not separate the
            model, since the rest reads more of what is before them, or no output depends on them.
    """
    cut = _main_values(model, dict.fromkeys(tensors))
    if not cut or any(value.producer() is None for value in cut):
        raise GraphError(
            "a model is split at tensors that its nodes make", got=str(list(tensors)), fix="name outputs of nodes"
        )
    before, _ = _between([], cut)
    outputs = list(dict.fromkeys(model.graph.outputs))
    early = [value for value in outputs if value.producer() is None or value.producer() in before]
    late = [value for value in outputs if value not in early]
    after, _ = _between(cut, late)
    read = {value for node in after - before for value in captured_or_read(node)}
    crossing = {value for value in read if value.producer() in before}
    if crossing - set(cut):
        raise GraphError(
            "these tensors do not separate the model",
            got=f"what follows also reads {sorted(_names(crossing - set(cut)))}",
            fix="split at these tensors, too",
        )
    joints = [value for value in cut if value in crossing]
    if not joints:
        raise GraphError("no output depends on these tensors", got=str(list(tensors)), fix="split at earlier tensors")
    own = [value for value in model.graph.inputs if value in read]
    first = extract(model, None, _names(dict.fromkeys([*cut, *early])))
    second = extract(model, _names([*joints, *own]), _names(late))
    known = {value.name for value in first.graph.inputs}
    return Split(
        first,
        second,
        connections=tuple(zip(_names(joints), _names(joints), strict=True)),
        shared_inputs=tuple(_names(value for value in own if value.name in known)),
        inputs=tuple(_names(value for value in model.graph.inputs if value in own or value.name in known)),
        outputs=tuple(_names(outputs)),
    )


def _names(values: Iterable[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _main_values(model: ir.Model, names: Iterable[str]) -> list[ir.Value]:
    """The tensors of these names, looked up in one walk over the model."""
    values = find_values(model, names)
    for value in values:
        if graph_of(value) is not model.graph:
            what = f"tensor {value.name!r} is inside a subgraph, which cannot be cut"
            raise GraphError(what, fix="name a tensor of the main graph")
    return values


def _between(starts: Sequence[ir.Value], ends: Iterable[ir.Value]) -> tuple[set[ir.Node], set[ir.Value]]:
    """The nodes that make the ends from the starts, and all that those nodes read from before and from weights."""
    nodes: set[ir.Node] = set()
    read: set[ir.Value] = set()
    waiting = list(ends)
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if value in starts or producer is None or producer in nodes:
            continue
        nodes.add(producer)
        graph = producer.graph
        values = [item for item in captured_or_read(producer) if graph_of(item) is graph]
        read.update(values)
        waiting += values
    return nodes, read


def _cut(copy: Copy, starts: Sequence[ir.Value], ends: Sequence[ir.Value], nodes: set[ir.Node]) -> None:
    graph = copy.model.graph
    new_starts = [_as_input(graph, copy.of(value)) for value in starts]
    replaced = {copy.of(value): new for value, new in zip(starts, new_starts, strict=True)}
    new_ends = [replaced.get(copy.of(value), copy.of(value)) for value in ends]
    kept = {copy.of(node) for node in nodes}
    graph.outputs[:] = new_ends
    graph.inputs[:] = [value for value in graph.inputs if value in new_starts]
    discard_nodes([node for node in graph if node not in kept])
    graph.inputs[:] = new_starts
    remove_unused_initializers(copy.model)
    remove_unused_functions(copy.model)
    # An input with a default may have become an initializer alone.
    allow_plain_initializers(copy.model)


def _as_input(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """An input in the place of a tensor, under its name; the node that makes the tensor may be needed for another."""
    if value.is_graph_input():
        return value
    if value.is_initializer():
        graph.initializers.pop(str(value.name))
        value.const_value = None
        return value
    name = str(value.name)
    rename_values(graph, {value: fresh_name(f"{name}_uncut", taken_names(graph, graph))})
    new = ir.Value(name=name, type=value.type, shape=value.shape)
    replace_uses(value, new)
    return new
