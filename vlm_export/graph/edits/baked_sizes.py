"""Constants that hold the old size of an axis: a Reshape's [1, 64], an Expand's [1, 1, 768], a Slice's end.

Exporters that trace write the size that they saw into the graph. Here the graph is gone through twice, at the old size
and at another one; what holds the old size where the other one belongs is made to follow the data, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import copy_of
from vlm_export.graph.core.names import inputs_of, subgraphs_of
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.core.operators import LIKE_FIRST_INPUT, RANDOM, evaluate, shape_result
from vlm_export.graph.core.tensors import (
    Sizes,
    attribute_ints,
    constant_argument,
    constant_integers,
    input_at,
    is_plain_number,
    sizes_of,
)
from vlm_export.graph.edits.size_repairs import (
    Entry,
    Follows,
    Repair,
    entry_repair,
    expand_repair,
    name_at,
    name_of_node,
    operand_repair,
    slice_repair,
)
from vlm_export.graph.prove.match_interfaces import AxisOfInput, Resized

Reading: TypeAlias = Literal["natural", "outer", "inner"]
READINGS: tuple[Reading, ...] = ("natural", "outer", "inner")
# Sizes of axes that stay open, tried one after the other: of lengths, and of images.
_OPEN_SIZES = (24, 64, 224)
# Of tensors that are followed by value: shapes, axes, masks of shapes.
_MAX_ENTRIES = 1024


class HeldError(GraphError):
    """A node that takes one element of a batch: the graph can be run, and leaves the others out."""


class MisfitError(Exception):
    """A node whose inputs do not fit together at these sizes; the message says why."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        self.node, self.reason = node, reason
        super().__init__(reason)


class _NodeSizes:
    """The sizes of tensors of the main graph, found by going through its nodes in order.

    What ONNX cannot tell (operators that it does not know, control flow, sizes that depend on values) stays unknown.
    """

    def __init__(self, model: ir.Model, chosen: Mapping[Resized, int], open_size: int) -> None:
        """
        Args:
            chosen: sizes of axes; others keep their fixed size, or get the open one.
        """
        self.model = copy_of(model).model
        sizes = {entry: size for group, size in chosen.items() for entry in group.axes}
        for value in self.model.graph.inputs:
            dims = [dim if isinstance(dim, int) else open_size for dim in value.shape or ()]
            if value.shape is not None:
                name = str(value.name)
                value.shape = ir.Shape([sizes.get(AxisOfInput(name, axis), dim) for axis, dim in enumerate(dims)])
        for node in self.model.graph:
            for value in node.outputs:
                value.shape = None
        self._contents: dict[ir.Value, Array | None] = {}

    def misfit(self) -> MisfitError | None:
        """Visits all nodes, up to the first whose inputs do not fit together, which is returned."""
        try:
            for node in self.model.graph:
                self.visit(node)
        except MisfitError as error:
            return error
        return None

    def visit(self, node: ir.Node) -> None:
        """States the shapes of the node's outputs; MisfitError where the operator does not take sizes of the inputs."""
        source, opset = input_at(node, 0), self.model.opset_imports.get("", 0)
        if node.domain != "" or any(True for _ in subgraphs_of(node)):
            if (node.domain, node.op_type) in LIKE_FIRST_INPUT and source is not None and source.shape is not None:
                node.outputs[0].shape = source.shape.copy()
            return
        self._check(node)
        types = {str(value.name): _type_proto(value) for value in inputs_of(node)}
        if None in types.values() or not onnx.defs.has(node.op_type, opset, ""):
            return
        contents = {str(value.name): self.content(value) for value in inputs_of(node)}
        try:
            found = onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, opset, ""),
                ir.to_proto(node),
                {name: kind for name, kind in types.items() if kind is not None},
                {name: numpy_helper.from_array(array, name) for name, array in contents.items() if array is not None},
                opset_imports=[onnx.helper.make_opsetid("", opset)],
                ir_version=self.model.ir_version,
            )
        except onnx.shape_inference.InferenceError as error:
            raise MisfitError(node, str(error).strip().splitlines()[-1]) from error
        except Exception:
            return
        for value in node.outputs:
            if value.name:
                _state(value, found.get(str(value.name)))
        self._compute(node, opset)

    def content(self, value: ir.Value | None) -> Array | None:
        """Returns the values of a small tensor that depends on constants and sizes alone, or None of another one."""
        if value is None:
            return None
        if value not in self._contents:
            constant = constant_argument(value)
            fits = constant is not None and constant.size <= _MAX_ENTRIES and is_plain_number(constant.dtype)
            self._contents[value] = constant if fits else None
        return self._contents[value]

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """Returns the content of a tensor of integers, flat."""
        content = self.content(value)
        return None if content is None or content.dtype.kind not in "iu" else [int(entry) for entry in content.flat]

    def _compute(self, node: ir.Node, opset: int) -> None:
        """Follows what is computed from sizes and small constants."""
        if node.op_type == "Shape" and (sizes := sizes_of(input_at(node, 0))) is not None:
            self._contents[node.outputs[0]] = np.array(shape_result(node, sizes), np.int64)
            return
        known = [self.content(value) for value in node.inputs]
        fits = all((sizes := sizes_of(value)) is None or prod(sizes) <= _MAX_ENTRIES for value in node.outputs)
        unknown = any(array is None and value is not None for array, value in zip(known, node.inputs, strict=True))
        if not known or unknown or not fits or node.op_type in RANDOM:
            return
        for value, array in zip(node.outputs, evaluate(node, known, opset) or (), strict=False):
            if array.size <= _MAX_ENTRIES:
                self._contents[value] = array
                value.shape = ir.Shape(array.shape)

    def _check(self, node: ir.Node) -> None:
        """What ONNX's own inference lets pass."""
        data, other = sizes_of(input_at(node, 0)), sizes_of(input_at(node, 1))
        if node.op_type == "Reshape" and data is not None:
            target = self.integers(input_at(node, 1))
            if target is not None and _resolved(node, data, target) is None:
                reason = f"{prod(data)} elements in sizes {list(data)} cannot have the shape {target}"
                raise MisfitError(node, reason)
        if node.op_type == "Gemm" and data is not None and other is not None and len(data) == len(other) == 2:
            turned, other_turned = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
            if data[0 if turned else 1] != other[1 if other_turned else 0]:
                raise MisfitError(node, f"matrices of {list(data)} and {list(other)} cannot be multiplied")


def _resolved(node: ir.Node, data: Sequence[int], target: Sequence[int]) -> list[int] | None:
    """The sizes that a Reshape gives to data of these sizes; None where they do not hold as many elements."""
    sizes = list(target)
    if not node.attributes.get_int("allowzero", 0):
        if any(size == 0 and axis >= len(data) for axis, size in enumerate(sizes)):
            return None
        sizes = [data[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if -1 in sizes:
        rest = prod(size for size in sizes if size != -1)
        if rest == 0 or prod(data) % rest:
            return None
        sizes[sizes.index(-1)] = prod(data) // rest
    return sizes if prod(sizes) == prod(data) else None


def _type_proto(value: ir.Value) -> onnx.TypeProto | None:
    tensor = value.const_value if value.is_initializer() else None
    if tensor is not None:
        return onnx.helper.make_tensor_type_proto(int(tensor.dtype), list(tensor.shape.numpy()))
    if not isinstance(value.type, ir.TensorType):
        return None
    dims = None if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
    return onnx.helper.make_tensor_type_proto(int(value.type.dtype), dims)


def _state(value: ir.Value, found: onnx.TypeProto | None) -> None:
    if found is None or not found.HasField("tensor_type"):
        return
    kind = found.tensor_type
    if value.type is None and kind.elem_type:
        value.type = ir.TensorType(ir.DataType(kind.elem_type))
    if kind.HasField("shape"):
        value.shape = ir.Shape([dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim])


def _open_size(model: ir.Model, groups: Sequence[Resized]) -> int | None:
    """The first size of open axes at which the model fits together at the old sizes."""
    old = {group: group.old for group in groups}
    return next((size for size in _OPEN_SIZES if _NodeSizes(model, old, size).misfit() is None), None)


def find_misfit(model: ir.Model, groups: Sequence[Resized]) -> MisfitError | None:
    """Returns the first node that does not take the data at the new sizes, or None where all do, as far as is known.

    A model that does not fit together at the old sizes either says nothing.
    """
    open_size = _open_size(model, groups)
    for number in range(max(len(group.probes()) for group in groups) if open_size is not None else 0):
        chosen = {group: group.probes()[number % len(group.probes())] for group in groups}
        misfit = _NodeSizes(model, chosen, open_size or 0).misfit()
        if misfit is not None:
            return misfit
    return None


def output_shapes(model: ir.Model, resized: Resized) -> dict[str, list[int | str | None]]:
    """Returns output → its axes in the new model, as far as going through the graph tells them."""
    probes, found = (resized.probes() * 2)[:2], list[dict[str, Sizes | None]]()
    # Sizes of other open axes are no sizes of the outputs.
    for size, open_size in zip(probes, _OPEN_SIZES, strict=False):
        sizes = _NodeSizes(model, {resized: size}, open_size)
        if sizes.misfit() is not None:
            return {}
        found.append({str(value.name): sizes_of(value) for value in sizes.model.graph.outputs})
    shapes: dict[str, list[int | str | None]] = {}
    for name, first in found[0].items():
        second = found[1][name]
        if first is not None and second is not None and len(first) == len(second):
            pairs = zip(first, second, strict=True)
            shapes[name] = [a if a == b else resized.new if (a, b) == probes else None for a, b in pairs]
    return shapes


def find_repairs(model: ir.Model, resized: Resized, reading: Reading = "natural") -> list[Repair]:
    """Returns what has to follow the data for the axes to have their new size.

    Args:
        reading: where an axis goes that a Reshape may have put in several places, as it may if its size was 1.

    Raises:
        GraphError: a node that cannot be repaired.
    """
    open_size = _open_size(model, [resized])
    return [] if open_size is None else _Search(model, resized, open_size, reading).run()


@dataclass(frozen=True)
class _Data:
    """A node's first input, of which one axis has another size now.

    Attributes:
        old_name: in the model as it is.
        name: in the repaired one, where another tensor may have taken its place.
        axis: the one that changes.
        before: all sizes at the old size.
        after: all sizes at the new size.
    """

    old_name: str
    name: str
    axis: int
    before: Sizes
    after: Sizes


class _Search:
    """Goes through the graph at the old size and at another one side by side, and repairs the second on the way."""

    def __init__(self, model: ir.Model, resized: Resized, open_size: int, reading: Reading) -> None:
        self._resized, self._reading = resized, reading
        self._before = _NodeSizes(model, {resized: resized.old}, open_size)
        self._after = _NodeSizes(model, {resized: resized.probes()[0]}, open_size)
        # Value → elements of its varying axis within one step of the axis that changes (1: it is the innermost part).
        self._inner: dict[str, int] = {}

    def run(self) -> list[Repair]:
        repairs: list[Repair] = []
        graph = self._after.model.graph
        for old, new in list(zip(self._before.model.graph, graph, strict=True)):
            self._before.visit(old)
            # A node may have several operands that hold the old size.
            done: set[tuple[int, str]] = set()
            while (repair := self._repair_of(old, new)) is not None and (repair.place, repair.text) not in done:
                done.add((repair.place, repair.text))
                repairs.append(repair)
                made = set(repair.make(graph)) - {new}
                for node in [node for node in graph if node in made]:
                    self._visit(node)
            self._visit(new)
            self._follow_inner(old, new)
        return repairs

    def _visit(self, node: ir.Node) -> None:
        try:
            self._after.visit(node)
        except MisfitError as error:
            raise refusal(error, self._resized) from error

    def _varying(self, old: ir.Value | None, new: ir.Value | None) -> _Data | None:
        """A value of which exactly one axis has another size now."""
        before, after = sizes_of(old), sizes_of(new)
        if before is None or after is None or len(before) != len(after):
            return None
        axes = [axis for axis, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
        if old is None or new is None or len(axes) != 1:
            return None
        return _Data(str(old.name), str(new.name), axes[0], before, after)

    def _follow_inner(self, old: ir.Node, new: ir.Node) -> None:
        """Where the axis that changes is part of a larger one, that part is where it was in the inputs."""
        for output in map(self._varying, old.outputs, new.outputs):
            if output is None or output.old_name in self._inner:
                continue
            for data in map(self._varying, old.inputs, new.inputs):
                same = data is not None and data.before[data.axis] == output.before[output.axis]
                if data is not None and same and data.old_name in self._inner:
                    self._inner[output.old_name] = self._inner[data.old_name]

    def _repair_of(self, old: ir.Node, new: ir.Node) -> Repair | None:
        if old.domain != "":
            return None
        rule, data = _RULES.get(old.op_type), self._varying(input_at(old, 0), input_at(new, 0))
        repair = rule(self, old, new, data) if rule is not None and data is not None else None
        return repair or self._operands(old, new)

    def _held(self, old: ir.Node, new: ir.Node, index: int) -> list[tuple[int, bool]]:
        """The integers of an input, each with whether it is the same at both sizes; none where they are not known."""
        was, now = self._before.integers(input_at(old, index)), self._after.integers(input_at(new, index))
        if was is None or now is None or len(was) != len(now):
            return []
        return [(entry, entry == other) for entry, other in zip(was, now, strict=True)]

    def _reshape(self, old: ir.Node, new: ir.Node, data: _Data) -> Repair | None:
        held, before, axis = self._held(old, new, 1), data.before, data.axis
        raw = [entry for entry, _ in held]
        sizes = _resolved(old, before, raw)
        place = self._place(data, sizes) if sizes is not None and held else None
        if sizes is None or place is None:
            return None
        position, self._inner[str(old.outputs[0].name)] = place
        wanted = sizes[position] * data.after[axis]
        right = wanted // before[axis] if wanted % before[axis] == 0 else None
        copies_zero = "allowzero" not in old.attributes
        follows_already = raw[position] == -1 or (raw[position] == 0 and copies_zero) or not held[position][1]
        if follows_already or right in (None, sizes[position]):
            return None
        entry: Entry = Follows(data.name, axis, sizes[position], before[axis])
        if position == axis and sizes[position] == before[axis] and copies_zero:
            entry = 0
        elif -1 not in raw:
            entry = -1
        return entry_repair(old, 1, raw, position, entry)

    def _place(self, data: _Data, target: Sequence[int]) -> tuple[int, int] | None:
        """Which size of the target holds the axis that changes, and what of it lies within one step of that axis."""
        sizes, axis, unit = data.before, data.axis, self._resized.old
        if sizes[axis] % unit:
            unit = sizes[axis]
        inner = self._inner.get(data.old_name, sizes[axis] // unit)
        if sizes[axis] % (unit * inner):
            unit, inner = sizes[axis], 1
        within = inner * prod(sizes[axis + 1 :])
        around = prod(sizes) // (within * unit) if within else 0
        found, merges = [], len(target) < len(sizes)
        for position, size in enumerate(target):
            behind, before = prod(target[position + 1 :]), prod(target[:position])
            if not behind or not before or within % behind or around % before:
                continue
            if (within // behind) * unit * (around // before) == size:
                found.append((size != unit, self._rank(position, axis, merges), position, within // behind))
        return min(found)[2:] if found else None

    def _rank(self, position: int, axis: int, merges: bool) -> int:
        """Which of several places comes first: where the axis was, or, if axes become one, the outermost."""
        if self._reading == "natural":
            return position if merges else int(position != axis)
        return position if self._reading == "outer" else -position

    def _expand(self, old: ir.Node, new: ir.Node, data: _Data) -> Repair | None:
        """Of an Expand, 1 leaves an axis as it is."""
        held, size = self._held(old, new, 1), data.before[data.axis]
        position = data.axis + len(held) - len(data.before)
        if not held or position < 0 or size == 1 or held[position] != (size, True):
            return None
        return entry_repair(old, 1, [entry for entry, _ in held], position, 1)

    def _resize(self, old: ir.Node, new: ir.Node, data: _Data) -> Repair | None:
        """Only images and channels are never resized: of height and width, a fixed size may be meant."""
        held, axis = self._held(old, new, 3), data.axis
        if "axes" in old.attributes or axis > 1 or axis >= len(held) or held[axis] != (data.before[axis], True):
            return None
        return entry_repair(old, 3, [entry for entry, _ in held], axis, Follows(data.name, axis))

    def _slice(self, old: ir.Node, new: ir.Node, data: _Data) -> Repair | None:
        """An end that is the whole size means "to the end"."""
        in_attributes = "ends" in new.attributes
        if in_attributes:
            ends, given_axes = list(new.attributes["ends"].as_ints()), attribute_ints(new, "axes")
            steps = [1] * len(ends)
        else:
            known = [constant_integers(input_at(new, index)) for index in (2, 3, 4)]
            if any(entry is None and input_at(new, index) is not None for index, entry in enumerate(known, 2)):
                return None
            ends, given_axes = known[0] or [], known[1]
            steps = known[2] or [1] * len(ends)
        for position, (end, place, step) in enumerate(zip(ends, given_axes or range(len(ends)), steps, strict=False)):
            if place % len(data.before) == data.axis and end == data.before[data.axis] and step > 0:
                return slice_repair(old, ends, position, in_attributes)
        return None

    def _gather(self, old: ir.Node, new: ir.Node, data: _Data) -> Repair | None:
        """One element of a batch of one is all of it; of a larger batch it is one.

        Raises:
            HeldError: the node takes it.
        """
        place = old.attributes.get_int("axis", 0)
        is_batch = self._resized.old == 1 and all(entry.axis == 0 for entry in self._resized.axes)
        if not is_batch or data.axis != 0 or place % len(data.before) != 0 or data.before[0] != 1:
            return None
        if self._before.content(old.inputs[1]) is None or self._after.integers(new.inputs[1]) not in ([0], [-1]):
            return None
        raise HeldError(
            f"{name_of_node(new)} takes one element of a batch: {self._resized}",
            where=f"the node that makes {new.outputs[0].name!r}",
            got=f"its index {name_at(new, 1)!r} is constant",
            fix="keep the size, replace the node first (`graph replace-node`), or export the model again with this "
            "axis open",
        )

    def _states(self, old: ir.Node, new: ir.Node, data: _Data) -> Repair | None:
        """First states of a recurrent operator: (directions, batch, hidden)."""
        if data.axis != 1 or old.attributes.get_int("layout", 0) != 0:
            return None
        for index in (5, 6):
            before, after = sizes_of(input_at(old, index)), sizes_of(input_at(new, index))
            if before is not None and after is not None and before[1] == after[1] == 1:
                return expand_repair(old, index, [1, Follows(data.name, 1), 1])
        return None

    def _operands(self, old: ir.Node, new: ir.Node) -> Repair | None:
        """An operand that keeps the old size beside others that have the new one."""
        pairs = [(sizes_of(was), sizes_of(now)) for was, now in zip(old.inputs, new.inputs, strict=True)]
        known = [(was, now) for was, now in pairs if was is not None and now is not None and len(was) == len(now)]
        if old.op_type not in _ALIGNED or len(known) < len(pairs):
            return None
        rank = max((len(before) for before, _ in known), default=0)
        apart = old.attributes["axis"].as_int() % rank if old.op_type == "Concat" and rank else None
        for axis in range(-rank, 0):
            # Operands are aligned at their last axes.
            sizes = {index: (b[axis], a[axis]) for index, (b, a) in enumerate(known) if len(b) >= -axis}
            leader = next((index for index, (was, now) in sizes.items() if was != now), None)
            if leader is None or axis + rank == apart:
                continue
            was, now = sizes[leader]
            follows = Follows(name_at(new, leader), len(known[leader][0]) + axis)
            for index, (size, size_now) in sizes.items():
                source = old.inputs[index]
                fits = size_now == now or (size_now == 1 and apart is None)
                if not fits and size == was and source is not None and new.inputs[leader] is not None:
                    before = known[index][0]
                    return operand_repair(old, index, source, before, len(before) + axis, follows)
        return None


def refusal(error: MisfitError, resized: Resized) -> GraphError:
    """Returns an error that says what does not fit, with the user's own names."""
    node = error.node
    where = f"the node that makes {node.outputs[0].name!r}"
    constants = [f"{value.name!r}{_content_text(value)}" for value in inputs_of(node) if not _depends_on_inputs(value)]
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
        if producer is not None and producer.op_type != "Shape":
            waiting += [source for source in inputs_of(producer) if source not in seen]
            seen.update(waiting)
    return False


# Operators whose operands have equal sizes, or 1 where they are stretched.
_ALIGNED = frozenset(
    {
        "Add", "And", "Concat", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean",
        "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
_RULES: Mapping[str, Callable[[_Search, ir.Node, ir.Node, _Data], Repair | None]] = {
    "Expand": _Search._expand,
    "GRU": _Search._states,
    "Gather": _Search._gather,
    "LSTM": _Search._states,
    "RNN": _Search._states,
    "Reshape": _Search._reshape,
    "Resize": _Search._resize,
    "Slice": _Search._slice,
}
