"""Constants that hold the old size of an axis: a Reshape's [1, 64], an Expand's [1, 1, 768], a Slice's end.

Exporters that trace write the size that they saw into the graph. Here the graph is gone through twice, at the old size
and at another one; what holds the old size where the other one belongs is made to follow the data, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Literal, TypeAlias

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import copy_of
from vlm_export.graph.core.tensors import constant_argument, constant_integers, input_at
from vlm_export.graph.edits.node_sizes import MisfitError, NodeSizes, Sizes, resolved
from vlm_export.graph.edits.size_repairs import (
    Entry,
    Follows,
    Repair,
    entry_repair,
    expand_repair,
    name_of_node,
    operand_repair,
    slice_repair,
)
from vlm_export.graph.prove.match_interfaces import AxisOfInput, Resized

Reading: TypeAlias = Literal["natural", "outer", "inner"]
READINGS: tuple[Reading, ...] = ("natural", "outer", "inner")
# Sizes of axes that stay open, tried one after the other: of lengths, and of images.
_OPEN_SIZES = (24, 64, 224)


class HeldError(GraphError):
    """A node that takes one element of a batch: the graph can be run, and leaves the others out."""


def find_misfit(model: ir.Model, groups: Sequence[Resized]) -> MisfitError | None:
    """Returns the first node that does not take the data at the new sizes, or None where all do, as far as is known.

    A model that does not fit together at the old sizes either says nothing.
    """
    for open_size in _OPEN_SIZES:
        if _misfit_at(model, {group: group.old for group in groups}, open_size) is None:
            for probe in range(max(len(group.probes()) for group in groups)):
                chosen = {group: group.probes()[probe % len(group.probes())] for group in groups}
                misfit = _misfit_at(model, chosen, open_size)
                if misfit is not None:
                    return misfit
            return None
    return None


def _misfit_at(model: ir.Model, chosen: Mapping[Resized, int], open_size: int) -> MisfitError | None:
    return NodeSizes(copy_of(model).model, _input_sizes(model, chosen, open_size)).visit_all()


def _input_sizes(model: ir.Model, chosen: Mapping[Resized, int], open_size: int) -> dict[str, list[int]]:
    sizes = {entry: size for group, size in chosen.items() for entry in group.axes}
    found: dict[str, list[int]] = {}
    for value in model.graph.inputs:
        if value.shape is not None:
            name = str(value.name)
            found[name] = [
                sizes.get(AxisOfInput(name, axis), dim if isinstance(dim, int) else open_size)
                for axis, dim in enumerate(value.shape)
            ]
    return found


def output_shapes(model: ir.Model, resized: Resized) -> dict[str, list[int | str | None]]:
    """Output → its axes in the new model, as far as going through the graph tells them."""
    found: list[dict[str, Sizes]] = []
    # Sizes of other open axes are no sizes of the outputs.
    for size, open_size in zip((*resized.probes() * 2,)[:2], _OPEN_SIZES[:2], strict=True):
        sizes = NodeSizes(copy_of(model).model, _input_sizes(model, {resized: size}, open_size))
        if sizes.visit_all() is not None:
            return {}
        known = {str(value.name): sizes.sizes(value) for value in sizes.model.graph.outputs}
        found.append({name: entry for name, entry in known.items() if entry is not None})
    first, second = found
    probes = (*resized.probes() * 2,)[:2]
    return {
        name: [_axis(pair, probes, resized.new) for pair in zip(first[name], second[name], strict=True)]
        for name in first
        if name in second and len(first[name]) == len(second[name])
    }


def _axis(pair: tuple[int, int], probes: Sequence[int], new: int | str) -> int | str | None:
    if pair[0] == pair[1]:
        return pair[0]
    return new if pair == tuple(probes) else None


def find_repairs(model: ir.Model, resized: Resized, reading: Reading = "natural") -> list[Repair]:
    """Returns what has to follow the data for the axes to have their new size.

    Args:
        reading: where an axis goes that a Reshape may have put in several places, as it may if its size was 1.

    Raises:
        GraphError: a node that cannot be repaired.
    """
    for open_size in _OPEN_SIZES:
        if _misfit_at(model, {resized: resized.old}, open_size) is None:
            return _Search(model, resized, open_size, reading).run()
    return []


class _Search:
    """Goes through the graph at the old size and at another one side by side, and repairs the second on the way."""

    def __init__(self, model: ir.Model, resized: Resized, open_size: int, reading: Reading) -> None:
        self._resized, self._reading = resized, reading
        first, second = copy_of(model).model, copy_of(model).model
        self._before = NodeSizes(first, _input_sizes(model, {resized: resized.old}, open_size))
        self._after = NodeSizes(second, _input_sizes(model, {resized: resized.probes()[0]}, open_size))
        # Value → elements of its varying axis within one step of the axis that changes (1: it is the innermost part).
        self._inner: dict[str, int] = {}

    def run(self) -> list[Repair]:
        repairs: list[Repair] = []
        nodes = list(zip(self._before.model.graph, self._after.model.graph, strict=True))
        for old, new in nodes:
            self._before.visit(old)
            # A node may have several operands that hold the old size.
            done: set[tuple[int, str]] = set()
            while (repair := self._repair_of(old, new)) is not None and (repair.place, repair.text) not in done:
                done.add((repair.place, repair.text))
                repairs.append(repair)
                made = set(repair.make(self._after.model.graph)) - {new}
                for node in [node for node in self._after.model.graph if node in made]:
                    self._visit(node)
            self._visit(new)
            self._follow_inner(old, new)
        return repairs

    def _visit(self, node: ir.Node) -> None:
        try:
            self._after.visit(node)
        except MisfitError as error:
            raise refusal(error, self._resized) from error

    def _pair(self, old: ir.Value | None, new: ir.Value | None) -> tuple[Sizes, Sizes] | None:
        before, after = self._before.sizes(old), self._after.sizes(new)
        return None if before is None or after is None or len(before) != len(after) else (before, after)

    def _varying(self, old: ir.Value | None, new: ir.Value | None) -> int | None:
        """The one axis of a value that has another size now."""
        pair = self._pair(old, new)
        axes = [] if pair is None else [axis for axis, (was, now) in enumerate(zip(*pair, strict=True)) if was != now]
        return axes[0] if len(axes) == 1 else None

    def _follow_inner(self, old: ir.Node, new: ir.Node) -> None:
        """Where the axis that changes is part of a larger one, that part is where it was in the inputs."""
        for was, now in zip(old.outputs, new.outputs, strict=False):
            axis = self._varying(was, now)
            if axis is None or str(was.name) in self._inner:
                continue
            size = (self._before.sizes(was) or ())[axis]
            for source_was, source in zip(old.inputs, new.inputs, strict=False):
                place = self._varying(source_was, source)
                name = "" if source_was is None else str(source_was.name)
                if place is not None and name in self._inner and (self._before.sizes(source_was) or ())[place] == size:
                    self._inner[str(was.name)] = self._inner[name]

    def _repair_of(self, old: ir.Node, new: ir.Node) -> Repair | None:
        rule = _RULES.get(old.op_type) if old.domain == "" else None
        repair = rule(self, old, new) if rule is not None else None
        return repair or (self._operands(old, new) if old.domain == "" else None)

    def _reshape(self, old: ir.Node, new: ir.Node) -> Repair | None:
        data, (raw, raw_now) = self._data(old, new), self._entries(old, new, 1)
        if data is None or raw is None or raw_now is None:
            return None
        axis, before, after = data
        sizes = resolved(old, before, raw)
        place = self._place(str(old.inputs[0].name) if old.inputs[0] else "", before, axis, sizes or [])
        if sizes is None or place is None:
            return None
        position, inner = place
        self._inner[str(old.outputs[0].name)] = inner
        wanted = sizes[position] * after[axis]
        right = wanted // before[axis] if wanted % before[axis] == 0 else None
        is_copied = raw[position] == 0 and "allowzero" not in old.attributes
        if raw[position] == -1 or is_copied or raw_now[position] != raw[position] or right in (None, sizes[position]):
            return None
        entry: Entry = Follows(str(new.inputs[0].name) if new.inputs[0] else "", axis, sizes[position], before[axis])
        if position == axis and sizes[position] == before[axis] and "allowzero" not in old.attributes:
            entry = 0
        elif -1 not in raw:
            entry = -1
        return entry_repair(old, 1, raw, position, entry)

    def _place(self, name: str, data: Sizes, axis: int, target: Sequence[int]) -> tuple[int, int] | None:
        """Which size of the target holds the axis that changes, and what of it lies within one step of that axis."""
        unit = self._resized.old
        if data[axis] % unit:
            unit = data[axis]
        inner = self._inner.get(name, data[axis] // unit)
        if data[axis] % (unit * inner):
            unit, inner = data[axis], 1
        within = inner * prod(data[axis + 1 :])
        around = prod(data) // (within * unit) if within else 0
        found, merges = [], len(target) < len(data)
        for position, size in enumerate(target):
            behind, before = prod(target[position + 1 :]), prod(target[:position])
            if not behind or not before or within % behind or around % before:
                continue
            if (within // behind) * unit * (around // before) == size:
                found.append((size != unit, self._rank(position, axis, merges), position, within // behind))
        return (min(found)[2], min(found)[3]) if found else None

    def _rank(self, position: int, axis: int, merges: bool) -> int:
        """Which of several places comes first: where the axis was, or, if axes become one, the outermost."""
        if self._reading == "natural":
            return position if merges else int(position != axis)
        return position if self._reading == "outer" else -position

    def _data(self, old: ir.Node, new: ir.Node) -> tuple[int, Sizes, Sizes] | None:
        """The axis of the first input that has another size now, with all of its sizes before and now."""
        axis, pair = self._varying(old.inputs[0], new.inputs[0]), self._pair(old.inputs[0], new.inputs[0])
        return None if axis is None or pair is None else (axis, *pair)

    def _entries(self, old: ir.Node, new: ir.Node, index: int) -> tuple[list[int] | None, list[int] | None]:
        """The integers of an input at both sizes."""
        was, now = self._before.integers(input_at(old, index)), self._after.integers(input_at(new, index))
        return (None, None) if was is None or now is None or len(was) != len(now) else (was, now)

    def _expand(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """Of an Expand, 1 leaves an axis as it is."""
        data, (raw, raw_now) = self._data(old, new), self._entries(old, new, 1)
        if data is None or raw is None or raw_now is None:
            return None
        axis, before, _ = data
        position = axis + len(raw) - len(before)
        if position < 0 or raw[position] != before[axis] or raw_now[position] != raw[position] or raw[position] == 1:
            return None
        return entry_repair(old, 1, raw, position, 1)

    def _resize(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """Only images and channels are never resized: of height and width, a fixed size may be meant."""
        data, (raw, raw_now) = self._data(old, new), self._entries(old, new, 3)
        if data is None or raw is None or raw_now is None or "axes" in old.attributes:
            return None
        axis, before, _ = data
        if axis > 1 or axis >= len(raw) or raw[axis] != before[axis] or raw_now[axis] != raw[axis]:
            return None
        return entry_repair(old, 3, raw, axis, Follows(str(new.inputs[0].name) if new.inputs[0] else "", axis))

    def _slice(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """An end that is the whole size means "to the end"."""
        data = self._data(old, new)
        if data is None:
            return None
        axis, before, _ = data
        in_attributes = "ends" in new.attributes
        if in_attributes:
            ends = list(new.attributes["ends"].as_ints())
            axes = list(new.attributes["axes"].as_ints()) if "axes" in new.attributes else list(range(len(ends)))
            steps = [1] * len(ends)
        else:
            known = [constant_integers(input_at(new, index)) for index in (2, 3, 4)]
            if any(entry is None and input_at(new, index) is not None for index, entry in enumerate(known, 2)):
                return None
            ends = known[0] or []
            axes, steps = known[1] or list(range(len(ends))), known[2] or [1] * len(ends)
        for position, (end, place, step) in enumerate(zip(ends, axes, steps, strict=False)):
            if place % len(before) == axis and end == before[axis] and step > 0:
                return slice_repair(old, ends, position, in_attributes)
        return None

    def _gather(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """One element of a batch of one is all of it; of a larger batch it is one.

        Raises:
            HeldError: the node takes it.
        """
        data = self._data(old, new)
        place = old.attributes.get_int("axis", 0)
        is_batch = self._resized.old == 1 and all(entry.axis == 0 for entry in self._resized.axes)
        if data is None or not is_batch or data[0] != 0 or place % len(data[1]) != 0 or data[1][0] != 1:
            return None
        if self._before.content(old.inputs[1]) is None or self._after.integers(new.inputs[1]) not in ([0], [-1]):
            return None
        raise HeldError(
            f"{name_of_node(new)} takes one element of a batch: {self._resized}",
            where=f"the node that makes {new.outputs[0].name!r}",
            got=f"its index {input_at(new, 1).name!r} is constant" if input_at(new, 1) else "",  # type: ignore[union-attr]
            fix="keep the size, replace the node first (`graph replace-node`), or export the model again with this "
            "axis open",
        )

    def _states(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """First states of a recurrent operator: (directions, batch, hidden)."""
        if self._varying(old.inputs[0], new.inputs[0]) != 1 or old.attributes.get_int("layout", 0) != 0:
            return None
        for index in (5, 6):
            state = self._pair(input_at(old, index), input_at(new, index))
            if state is not None and state[1][1] == state[0][1] == 1:
                follows = Follows(str(new.inputs[0].name) if new.inputs[0] else "", 1)
                return expand_repair(old, index, [1, follows, 1])
        return None

    def _operands(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """An operand that keeps the old size beside others that have the new one."""
        if old.op_type not in _ALIGNED:
            return None
        pairs = [self._pair(*values) for values in zip(old.inputs, new.inputs, strict=True)]
        if any(pair is None for pair in pairs):
            return None
        known = [pair for pair in pairs if pair is not None]
        rank = max((len(pair[0]) for pair in known), default=0)
        apart = old.attributes["axis"].as_int() % rank if old.op_type == "Concat" and rank else None
        for axis in range(rank):
            leaders = [
                index
                for index, pair in enumerate(known)
                if len(pair[0]) >= rank - axis and pair[0][axis - rank] != pair[1][axis - rank]
            ]
            if not leaders or axis == apart:
                continue
            leader = leaders[0]
            was, now = (known[leader][side][axis - rank] for side in (0, 1))
            for index, (before, after) in enumerate(known):
                place = axis - rank + len(before)
                if place < 0 or after[place] in ((now,) if apart is not None else (now, 1)):
                    continue
                value, source = new.inputs[leader], old.inputs[index]
                if before[place] != was or source is None or value is None:
                    continue
                follows = Follows(str(value.name), len(known[leader][0]) + axis - rank)
                return operand_repair(old, index, source, before, place, follows)
        return None


def refusal(error: MisfitError, resized: Resized) -> GraphError:
    """Returns an error that says what does not fit, with the user's own names."""
    node = error.node
    constants = [
        f"{value.name!r}{_content_text(value)}"
        for value in node.inputs
        if value is not None and not _depends_on_inputs(value)
    ]
    where = f"the node that makes {node.outputs[0].name!r}"
    if not constants:
        return GraphError(
            f"types or shapes do not fit together at {name_of_node(node)}: {resized}",
            where=where,
            got=error.reason,
            fix="state the other inputs' sizes too, or keep the size",
        )
    return GraphError(
        f"{name_of_node(node)} holds the old size: {resized}",
        where=where,
        expected="constants that fit the new size, or follow the data",
        got=f"{error.reason}; its constants: {', '.join(constants)}",
        fix="keep the size, replace the node or its constant first (`graph replace-node`), or export the model again "
        "with this axis open",
    )


def _content_text(value: ir.Value) -> str:
    """The numbers of a shape or an index; of others only how large they are."""
    constant = constant_argument(value)
    if constant is not None and constant.dtype.kind in "iu" and constant.size <= 16:
        return f" = {constant.tolist()}"
    return f" of sizes {list(value.shape)}" if value.shape is not None else ""


def _depends_on_inputs(value: ir.Value) -> bool:
    """Whether a value is computed from an input of the model, and not from constants alone."""
    seen, waiting = {value}, [value]
    while waiting:
        entry = waiting.pop()
        if entry.is_graph_input() and not entry.is_initializer():
            return True
        producer = entry.producer()
        sources = [] if producer is None or producer.op_type == "Shape" else producer.inputs
        fresh = [source for source in sources if source is not None and source not in seen]
        seen.update(fresh)
        waiting += fresh
    return False


# Operators whose operands have equal sizes, or 1 where they are stretched.
_ALIGNED = frozenset({"Add", "And", "Concat", "Div", "Equal", "Greater", "Less", "Max", "Mean", "Min", "Mul", "Or"})
_ALIGNED |= {"Pow", "PRelu", "Sub", "Sum", "Where", "Xor", "GreaterOrEqual", "LessOrEqual", "Mod"}
_RULES: Mapping[str, Callable[[_Search, ir.Node, ir.Node], Repair | None]] = {
    "Expand": _Search._expand,
    "GRU": _Search._states,
    "Gather": _Search._gather,
    "LSTM": _Search._states,
    "RNN": _Search._states,
    "Reshape": _Search._reshape,
    "Resize": _Search._resize,
    "Slice": _Search._slice,
}
