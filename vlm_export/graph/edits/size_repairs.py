"""Constants made to follow the data: what becomes of one that holds an old size, and the nodes that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.names import fresh_name, fresh_node_name, taken_names
from vlm_export.graph.core.replace_uses import add_initializer
from vlm_export.graph.core.tensors import constant_integers, input_at
from vlm_export.graph.edits.node_sizes import Sizes


@dataclass(frozen=True)
class Follows:
    """The size of an axis at run time, times `times`, divided by `by`."""

    value: str
    axis: int
    times: int = 1
    by: int = 1


# An entry of a shape: a number, or the size of an axis of a value times a fraction.
Entry: TypeAlias = "int | Follows"


@dataclass(frozen=True)
class Repair:
    """One constant that will follow the data.

    Attributes:
        node: name of the first tensor that the node makes.
        text: what becomes of it, for the report.
        place: which input of the node.
        edit: does so in a graph that has the node; returns the nodes that are new or changed.
    """

    node: str
    text: str
    place: int
    edit: Callable[[ir.Graph, ir.Node], list[ir.Node]]

    def make(self, graph: ir.Graph) -> list[ir.Node]:
        """Repairs the node of that name in a graph; returns the nodes that are new or changed."""
        (node,) = (node for node in graph if node.outputs and node.outputs[0].name == self.node)
        return self.edit(graph, node)


def name_of_node(node: ir.Node) -> str:
    """Its operator, and its name or that of the first tensor that it makes."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def entry_repair(node: ir.Node, index: int, raw: Sequence[int], position: int, entry: Entry) -> Repair:
    """Puts another entry into an input that holds a shape, whether it is a constant or computed."""
    source = input_at(node, index)
    is_constant = constant_integers(source) is not None
    entries: list[Entry] = [entry if place == position else size for place, size in enumerate(raw)]
    base = str(source.name) if source is not None else ""

    def make(maker: _Maker, computed: ir.Value) -> ir.Value:
        if is_constant:
            return maker.shape(entries)
        parts: list[Entry | ir.Value] = [entry]
        if position:
            parts.insert(0, maker.node("Gather", [computed, maker.constant(list(range(position)))]))
        if position + 1 < len(raw):
            parts.append(maker.node("Gather", [computed, maker.constant(list(range(position + 1, len(raw))))]))
        return maker.joined(parts)

    return _input_repair(node, index, f"{list(raw)} becomes {_shown(entries)}", make, base)


def _input_repair(
    node: ir.Node, index: int, text: str, make: Callable[[_Maker, ir.Value], ir.Value], base: str = ""
) -> Repair:
    """An input of the node is replaced by what is made of it."""

    def edit(graph: ir.Graph, target: ir.Node) -> list[ir.Node]:
        maker = _Maker(graph, target, base)
        operand = target.inputs[index]
        assert operand is not None
        target.replace_input_with(index, make(maker, operand))
        return [*maker.nodes, target]

    return Repair(str(node.outputs[0].name), f"{name_of_node(node)}: {text}", index, edit)


def _shown(entries: Sequence[Entry]) -> str:
    return f"[{', '.join(map(_shown_entry, entries))}]"


def _shown_entry(entry: Entry) -> str:
    if isinstance(entry, int):
        return str(entry)
    factor = f"·{entry.times}" if entry.times != 1 else ""
    return f"size of {entry.value!r}[{entry.axis}]{factor}" + (f"/{entry.by}" if entry.by != 1 else "")


def slice_repair(node: ir.Node, ends: Sequence[int], position: int, in_attributes: bool) -> Repair:
    """Makes one end of a Slice the end of its axis, whatever that is."""
    source = input_at(node, 2)
    is_narrow = source is not None and source.dtype == ir.DataType.INT32
    kind = np.int32 if is_narrow else np.int64
    new = [int(np.iinfo(kind).max) if place == position else end for place, end in enumerate(ends)]
    text = f"the end {ends[position]} becomes the axis's own"
    if not in_attributes:
        return _input_repair(node, 2, text, lambda maker, _: maker.constant(new, kind))

    def edit(graph: ir.Graph, target: ir.Node) -> list[ir.Node]:
        target.attributes["ends"] = ir.AttrInt64s("ends", new)
        return [target]

    return Repair(str(node.outputs[0].name), f"{name_of_node(node)}: {text}", 2, edit)


def expand_repair(node: ir.Node, index: int, entries: Sequence[Entry], source: int | None = None) -> Repair:
    """Expands the operand, or what its producer takes at `source`, to these entries."""

    def make(maker: _Maker, operand: ir.Value) -> ir.Value:
        producer = operand.producer()
        inner = operand if source is None or producer is None else producer.inputs[source]
        return maker.node("Expand", [inner, maker.shape(entries)])

    return _input_repair(node, index, f"{_name_at(node, index)!r} is expanded to {_shown(entries)}", make)


def _name_at(node: ir.Node, index: int) -> str:
    operand = node.inputs[index]
    return str(operand.name) if operand is not None else ""


def operand_repair(
    node: ir.Node, index: int, source: ir.Value, sizes: Sizes, place: int, follows: Follows
) -> Repair | None:
    """Makes the operand's axis at `place` as long as that of another operand; returns None where it cannot be
    stretched."""
    ones: list[Entry] = [follows if axis == place else 1 for axis in range(len(sizes))]
    if sizes[place] == 1:
        return expand_repair(node, index, ones)
    producer = source.producer()
    if producer is None or producer.domain != "" or not producer.inputs:
        return None
    full: list[Entry] = [follows if axis == place else size for axis, size in enumerate(sizes)]
    if producer.op_type == "Expand":
        inner = producer.inputs[0]
        shape = None if inner is None or inner.shape is None else inner.shape.dims
        offset = place - len(sizes) + len(shape or ())
        if shape is not None and (offset < 0 or shape[offset] == 1):
            return expand_repair(node, index, full, source=0)
    repeats = constant_integers(input_at(producer, 1)) if producer.op_type == "Tile" else None
    if repeats is not None and sizes[place] == repeats[place]:
        entries: list[Entry] = [follows if axis == place else count for axis, count in enumerate(repeats)]
        return _remade_repair(node, index, "repeated", 1, entries)
    if producer.op_type == "Slice" and _is_from_the_start(producer, place, sizes[place]):
        return _remade_repair(node, index, "cut", 2, [follows])
    if producer.op_type == "ConstantOfShape" and constant_integers(producer.inputs[0]) is not None:
        return _remade_repair(node, index, "filled", 0, full)
    return None


def _is_from_the_start(node: ir.Node, axis: int, end: int) -> bool:
    """Whether a Slice keeps the first `end` of one axis, and all of the others."""
    known = [constant_integers(input_at(node, place)) for place in (1, 2, 3)]
    steps = constant_integers(input_at(node, 4)) if input_at(node, 4) is not None else [1]
    return known == [[0], [end], [axis]] and steps == [1]


def _remade_repair(node: ir.Node, index: int, verb: str, argument: int, entries: Sequence[Entry]) -> Repair:
    """The operand made again by the same operator, with another argument."""

    def make(maker: _Maker, operand: ir.Value) -> ir.Value:
        producer = operand.producer()
        assert producer is not None
        inputs = list(producer.inputs)
        inputs[argument] = maker.shape(entries)
        made = maker.node(producer.op_type, inputs, list(producer.attributes.values()))
        made.type = operand.type
        return made

    return _input_repair(node, index, f"{_name_at(node, index)!r} is {verb} to {_shown(entries)}", make)


class _Maker:
    """Makes nodes and constants right before a node; equal constants are one."""

    def __init__(self, graph: ir.Graph, before: ir.Node, base: str = "") -> None:
        self._graph, self._before = graph, before
        self._taken = taken_names(graph, graph)
        self._base = f"{base or before.outputs[0].name}.sizes"
        self._known = {str(value.name): value for value in graph.inputs} | dict(graph.initializers)
        self._known |= {str(value.name): value for node in graph for value in node.outputs}
        self.nodes: list[ir.Node] = []

    def constant(self, entries: Sequence[int], kind: type[np.signedinteger] = np.int64) -> ir.Value:
        name = fresh_name(self._base, self._taken)
        return add_initializer(self._graph, ir.tensor(np.array(entries, kind), name=name), name)

    def node(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        name = fresh_node_name(self._graph, f"{self._base}.{op_type}")
        node = ir.Node("", op_type, list(inputs), list(attributes), num_outputs=1, name=name)
        node.outputs[0].name = fresh_name(f"{self._base}.{op_type}", self._taken)
        self._graph.insert_before(self._before, node)
        self.nodes.append(node)
        return node.outputs[0]

    def shape(self, entries: Sequence[Entry]) -> ir.Value:
        if all(isinstance(entry, int) for entry in entries):
            return self.constant([entry for entry in entries if isinstance(entry, int)])
        return self.joined(list(entries))

    def joined(self, parts: Sequence[Entry | ir.Value]) -> ir.Value:
        """Joins numbers, sizes that follow, and parts of other shapes to one shape."""
        values: list[ir.Value] = []
        numbers: list[int] = []
        for part in [*parts, None]:
            if isinstance(part, int):
                numbers.append(part)
                continue
            if numbers:
                values.append(self.constant(numbers))
                numbers = []
            if part is not None:
                values.append(self._size(part) if isinstance(part, Follows) else part)
        return self.node("Concat", values, [ir.AttrInt64("axis", 0)]) if len(values) > 1 else values[0]

    def _size(self, follows: Follows) -> ir.Value:
        shape = self.node("Shape", [self._known[follows.value]])
        size = self.node("Gather", [shape, self.constant([follows.axis])])
        if follows.times != follows.by:
            size = self.node("Mul", [size, self.constant([follows.times])])
            size = self.node("Div", [size, self.constant([follows.by])])
        return size
