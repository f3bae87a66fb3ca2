"""Integers that a graph computes from constants and from sizes of axes, followed without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.graph.core.tensors import constant_argument, input_at

# Entries are int or AxisSize, with no axis or one.
Integers: TypeAlias = npt.NDArray[np.object_]
MAX_ENTRIES = 64


@dataclass(frozen=True, eq=False)
class AxisSize:
    """The size, not known before a run, of one axis of a value."""

    value: ir.Value
    axis: int


class KnownIntegers:
    """Follows values back to constants and shapes; remembers what it found."""

    def __init__(self) -> None:
        self._found: dict[ir.Value, Integers | None] = {}

    def of(self, value: ir.Value | None) -> Integers | None:
        """The integers of a value with at most one axis; None where some cannot be known."""
        if value is None:
            return None
        if value not in self._found:
            self._found[value] = None
            self._found[value] = self._follow(value)
        return self._found[value]

    def dtype_of(self, value: ir.Value | None) -> np.dtype[Any] | None:
        """The dtype of integers that `of` knows; None where it cannot be told."""
        while value is not None:
            constant = constant_argument(value)
            if constant is not None:
                return constant.dtype
            if value.dtype is not None:
                return value.dtype.numpy()
            node = value.producer()
            if node is None or node.domain != "" or node.op_type not in _OPERATORS:
                return None
            if node.op_type == "Shape":
                return np.dtype(np.int64)
            if node.op_type == "Cast":
                to = node.attributes.get("to")
                return None if to is None or to.is_ref() else ir.DataType(to.as_int()).numpy()
            # The others make what their first input is.
            value = input_at(node, 0)
        return None

    def _follow(self, value: ir.Value) -> Integers | None:
        constant = constant_argument(value)
        if constant is not None:
            fits = constant.dtype.kind in "iu" and constant.ndim <= 1 and constant.size <= MAX_ENTRIES
            return constant.astype(object) if fits else None
        node = value.producer()
        follow = _OPERATORS.get(node.op_type) if node is not None and node.domain == "" else None
        if node is None or follow is None or len(node.outputs) != 1:
            return None
        result = follow(self, node)
        return result if result is not None and result.ndim <= 1 and result.size <= MAX_ENTRIES else None


def _shape(known: KnownIntegers, node: ir.Node) -> Integers | None:
    source = input_at(node, 0)
    if source is None or source.shape is None:
        return None
    sizes = [size if isinstance(size, int) else AxisSize(source, axis) for axis, size in enumerate(source.shape)]
    start, end = node.attributes.get("start"), node.attributes.get("end")
    if any(attribute is not None and attribute.is_ref() for attribute in (start, end)):
        return None
    first = start.as_int() if start is not None else 0
    last = end.as_int() if end is not None else len(sizes)
    return _objects(sizes[slice(*(_clamped(bound, len(sizes)) for bound in (first, last)))])


def _clamped(bound: int, rank: int) -> int:
    return min(max(bound + rank if bound < 0 else bound, 0), rank)


def _objects(entries: list[Any]) -> Integers:
    array = np.empty(len(entries), dtype=object)
    array[:] = entries
    return array


def _same(known: KnownIntegers, node: ir.Node) -> Integers | None:
    return known.of(input_at(node, 0))


def _cast(known: KnownIntegers, node: ir.Node) -> Integers | None:
    source, dtype = known.of(input_at(node, 0)), known.dtype_of(node.outputs[0])
    if source is None or dtype is None or dtype not in (np.int32, np.int64):
        return None
    wrapped = [entry if isinstance(entry, AxisSize) else _wrapped(entry, dtype) for entry in source.reshape(-1)]
    return _objects(wrapped).reshape(source.shape)


def _wrapped(entry: int, dtype: np.dtype[Any]) -> int:
    bits = 8 * dtype.itemsize
    return (entry + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _gather(known: KnownIntegers, node: ir.Node) -> Integers | None:
    data, indices = known.of(input_at(node, 0)), known.of(input_at(node, 1))
    if data is None or indices is None or data.ndim != 1 or not _are_numbers(indices):
        return None
    positions = indices.astype(np.int64)
    if ((positions < -len(data)) | (positions >= len(data))).any():
        return None
    return np.asarray(data[positions], dtype=object) if positions.ndim else _scalar(data[int(positions)])


def _scalar(entry: Any) -> Integers:
    array = np.empty((), dtype=object)
    array[()] = entry
    return array


def _slice(known: KnownIntegers, node: ir.Node) -> Integers | None:
    arguments = [known.of(value) for value in node.inputs if value is not None]
    if len(node.inputs) < 3 or len(arguments) != len(node.inputs):
        return None
    data, *rest = [argument for argument in arguments if argument is not None]
    if len(rest) != len(arguments) - 1 or data.ndim != 1:
        return None
    if not all(_are_numbers(entry) and entry.size == 1 for entry in rest):
        return None
    start, end, axis, step = [*(int(entry.reshape(-1)[0]) for entry in rest), *(0, 1)[len(rest) - 2 :]]
    if axis not in (0, -1) or step <= 0:
        return None
    return np.asarray(data[slice(_clamped(start, len(data)), _clamped(end, len(data)), step)], dtype=object)


def _concat(known: KnownIntegers, node: ir.Node) -> Integers | None:
    parts = [known.of(value) for value in node.inputs]
    if any(part is None or part.ndim != 1 for part in parts):
        return None
    return _objects([entry for part in parts if part is not None for entry in part])


def _unsqueeze(known: KnownIntegers, node: ir.Node) -> Integers | None:
    data = known.of(input_at(node, 0))
    return data.reshape(1) if data is not None and data.ndim == 0 and _is_only_axis(known, node) else None


def _squeeze(known: KnownIntegers, node: ir.Node) -> Integers | None:
    data = known.of(input_at(node, 0))
    states_axes = input_at(node, 1) is not None or "axes" in node.attributes
    if data is None or data.shape != (1,) or (states_axes and not _is_only_axis(known, node)):
        return None
    return data.reshape(())


def _is_only_axis(known: KnownIntegers, node: ir.Node) -> bool:
    """Whether the axes, an input or an attribute, are the one that an array with one axis has."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return not attribute.is_ref() and list(attribute.as_ints()) in ([0], [-1])
    axes = known.of(input_at(node, 1))
    return axes is not None and axes.reshape(-1).tolist() in ([0], [-1])


def _reshape(known: KnownIntegers, node: ir.Node) -> Integers | None:
    data, target = known.of(input_at(node, 0)), known.of(input_at(node, 1))
    if data is None or target is None or target.shape != (1,) or target[0] not in (-1, data.size):
        return None
    return data.reshape(-1)


def _arithmetic(compute: Callable[[Any, Any], Any]) -> Callable[[KnownIntegers, ir.Node], Integers | None]:
    def follow(known: KnownIntegers, node: ir.Node) -> Integers | None:
        first, second = known.of(input_at(node, 0)), known.of(input_at(node, 1))
        dtype = known.dtype_of(node.outputs[0])
        if first is None or second is None or dtype is None or not _are_numbers(first) or not _are_numbers(second):
            return None
        try:
            # In the graph's dtype, in which numbers that are too large wrap; Python's integers do not.
            return np.asarray(compute(first.astype(dtype), second.astype(dtype))).astype(object)
        except (ValueError, OverflowError):
            return None

    return follow


def _divide(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Towards zero, as ONNX divides integers; the smallest has no absolute value."""
    if not second.all() or (first.dtype.kind == "i" and (first == np.iinfo(first.dtype).min).any()):
        raise ValueError
    quotient = np.abs(first) // np.abs(second)
    return np.asarray(np.where((first < 0) != (second < 0), -quotient, quotient).astype(first.dtype))


def _are_numbers(entries: Integers) -> bool:
    return not any(isinstance(entry, AxisSize) for entry in entries.reshape(-1))


_OPERATORS: dict[str, Callable[[KnownIntegers, ir.Node], Integers | None]] = {
    "Add": _arithmetic(np.add),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _arithmetic(_divide),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _arithmetic(np.multiply),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(np.subtract),
    "Unsqueeze": _unsqueeze,
}
