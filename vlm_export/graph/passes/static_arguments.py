"""Arguments that a graph computes though they are fixed, made constants: shapes, axes, repeats, pads, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.graph.core.names import fresh_name, nested_graphs, root_graphs, taken_names
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.core.operators import evaluate, shape_result
from vlm_export.graph.core.replace_uses import add_constant
from vlm_export.graph.core.skeleton import allow_plain_initializers
from vlm_export.graph.core.tensors import constant_argument, constant_tensor, input_at
from vlm_export.graph.passes.dead_code import remove_dead_code

# Operator → inputs that are arguments: integers that decide shapes or axes.
_ARGUMENTS: Mapping[str, Sequence[int]] = {
    **dict.fromkeys((
        "CenterCropPad", "Expand", "OneHot", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
        "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape", "Split", "Squeeze", "Tile",
        "TopK", "Unsqueeze",
    ), (1,)),
    "ConstantOfShape": (0,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
}  # fmt: skip
# Entries are int or _AxisSize, with no axis or one.
_Integers: TypeAlias = npt.NDArray[np.object_]
_MAX_ENTRIES = 64
# Operators that only put entries of their first input (a Concat: of all) elsewhere, and those that compute with them.
_MOVING = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})


def make_arguments_static(model: ir.Model) -> int:
    """Replaces, in place, computed arguments by constants where they follow from constants and fixed sizes.

    Of a Reshape also those that repeat axes of its own input, whatever their size: they become 0, "as it was".

    Returns:
        How many arguments were replaced; what only computed them is removed.
    """
    count = 0
    for root in root_graphs(model):
        for graph in list(nested_graphs(root)):
            count += _GraphArguments(root, graph, in_function=root is not model.graph).replace()
    if count:
        remove_dead_code(model)
        allow_plain_initializers(model)
    return count


class _GraphArguments:
    def __init__(self, root: ir.Graph, graph: ir.Graph, in_function: bool) -> None:
        self._graph, self._in_function = graph, in_function
        self._taken = taken_names(root, graph)
        self._known = _KnownIntegers(root.opset_imports.get("", 0))
        self._made: dict[tuple[tuple[int, ...], bytes, ir.DataType], ir.Value] = {}

    def replace(self) -> int:
        nodes = [node for node in self._graph if node.domain == ""]
        return sum(self._replace(node, index) for node in nodes for index in _ARGUMENTS.get(node.op_type, ()))

    def _replace(self, node: ir.Node, index: int) -> bool:
        value = input_at(node, index)
        if value is None or constant_tensor(value) is not None:
            return False
        known, dtype = self._known.of(value), self._known.dtype_of(value)
        if known is not None and not _are_numbers(known):
            known = _copied_axes(node, known) if node.op_type == "Reshape" else None
        if known is None or dtype is None:
            return False
        node.replace_input_with(index, self._constant(known.astype(dtype), str(value.name), node))
        return True

    def _constant(self, array: Array, base: str, reader: ir.Node) -> ir.Value:
        """A constant of that content; equal ones are one, but for functions, where each has a node of its own."""
        tensor = ir.tensor(array)
        key = (array.shape, array.tobytes(), tensor.dtype)
        if key not in self._made or self._in_function:
            tensor.name = fresh_name(f"{base}.static", self._taken)
            before = reader if self._in_function else None
            self._made[key] = add_constant(self._graph, tensor, tensor.name, before=before)
        return self._made[key]


def _copied_axes(node: ir.Node, known: _Integers) -> _Integers | None:
    """The sizes of a Reshape with 0 for axes that it leaves as they are; None where another axis is not fixed."""
    allowzero = node.attributes.get("allowzero")
    if allowzero is not None and (allowzero.is_ref() or allowzero.as_int() != 0):
        return None
    sizes = known.reshape(-1).tolist()
    copied = [_AxisSize(node.inputs[0], axis) for axis in range(len(sizes))]
    sizes = [0 if size == own else size for size, own in zip(sizes, copied, strict=True)]
    return _objects(sizes) if not any(isinstance(size, _AxisSize) for size in sizes) else None


@dataclass(frozen=True)
class _AxisSize:
    """The size, not known before a run, of one axis of a value."""

    value: ir.Value | None
    axis: int


class _KnownIntegers:
    """Follows values back to constants and to shapes, without running the graph; remembers what it found."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._found: dict[ir.Value, _Integers | None] = {}

    def of(self, value: ir.Value | None) -> _Integers | None:
        """Returns the integers of a value with at most one axis, or None where some cannot be known."""
        if value is None:
            return None
        if value not in self._found:
            self._found[value] = None
            result = self._follow(value)
            is_small = result is not None and result.ndim <= 1 and result.size <= _MAX_ENTRIES
            self._found[value] = result if is_small else None
        return self._found[value]

    def dtype_of(self, value: ir.Value | None) -> np.dtype[Any] | None:
        """Returns the dtype of integers that `of` knows, or None where it cannot be told."""
        while value is not None:
            constant = constant_argument(value)
            if constant is not None:
                return constant.dtype
            if value.dtype is not None:
                return value.dtype.numpy()
            node = value.producer()
            if node is None or node.domain != "" or node.op_type not in _MOVING | _ARITHMETIC | {"Cast", "Shape"}:
                return None
            if node.op_type == "Shape":
                return np.dtype(np.int64)
            if node.op_type == "Cast":
                to = node.attributes.get("to")
                return None if to is None or to.is_ref() else ir.DataType(to.as_int()).numpy()
            # The others make what their first input is.
            value = input_at(node, 0)
        return None

    def _follow(self, value: ir.Value) -> _Integers | None:
        constant = constant_argument(value)
        if constant is not None:
            return constant.astype(object) if constant.dtype.kind in "iu" else None
        node = value.producer()
        if node is None or node.domain != "" or len(node.outputs) != 1:
            return None
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return None
        if node.op_type == "Shape":
            source = input_at(node, 0)
            if source is None or source.shape is None:
                return None
            axes = enumerate(source.shape)
            sizes = [size if isinstance(size, int) else _AxisSize(source, axis) for axis, size in axes]
            return _objects(shape_result(node, sizes))
        if node.op_type == "Cast":
            return self._cast(node)
        if node.op_type in _MOVING:
            return self._moved(node)
        return self._computed(node) if node.op_type in _ARITHMETIC else None

    def _cast(self, node: ir.Node) -> _Integers | None:
        source, dtype = self.of(input_at(node, 0)), self.dtype_of(node.outputs[0])
        if source is None or dtype is None or dtype not in (np.int32, np.int64):
            return None
        bits = 8 * dtype.itemsize
        wrapped = [
            entry if isinstance(entry, _AxisSize) else (entry + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
            for entry in source.reshape(-1)
        ]
        return _objects(wrapped).reshape(source.shape)

    def _moved(self, node: ir.Node) -> _Integers | None:
        """Where entries go is found by moving their positions."""
        entries: list[Any] = []
        arrays: list[Array | None] = []
        for index, value in enumerate(node.inputs):
            known = self.of(value)
            if value is None:
                arrays.append(None)
            elif known is not None and (index == 0 or node.op_type == "Concat"):
                arrays.append(np.arange(len(entries), len(entries) + known.size).reshape(known.shape))
                entries += known.reshape(-1).tolist()
            elif known is not None and _are_numbers(known):
                arrays.append(known.astype(self.dtype_of(value)))
            else:
                return None
        found = evaluate(node, arrays, self._opset)
        return _objects(entries)[found[0].reshape(-1)].reshape(found[0].shape) if found else None

    def _computed(self, node: ir.Node) -> _Integers | None:
        """In the graph's dtype, in which numbers that are too large wrap."""
        dtype = self.dtype_of(node.outputs[0])
        known = [self.of(value) for value in node.inputs]
        if dtype is None or any(entries is None or not _are_numbers(entries) for entries in known):
            return None
        first, second = (np.asarray(entries).astype(dtype) for entries in known)
        if node.op_type == "Div" and (not second.all() or (dtype.kind == "i" and (first == np.iinfo(dtype).min).any())):
            # By zero, or of the smallest, which has no absolute value: engines differ.
            return None
        found = evaluate(node, [first, second], self._opset)
        return found[0].astype(object) if found else None


def _objects(entries: list[Any]) -> _Integers:
    array = np.empty(len(entries), dtype=object)
    array[:] = entries
    return array


def _are_numbers(entries: _Integers) -> bool:
    return not any(isinstance(entry, _AxisSize) for entry in entries.reshape(-1))
