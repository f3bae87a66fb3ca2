"""Integers that a graph computes from constants and from sizes of axes, followed without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.graph.core.operators import evaluate
from vlm_export.graph.core.tensors import constant_argument, input_at

# Entries are int or AxisSize, with no axis or one.
Integers: TypeAlias = npt.NDArray[np.object_]
MAX_ENTRIES = 64
# Operators that only put entries of their first input (a Concat: of all) elsewhere, and those that compute with them.
_MOVING = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})


@dataclass(frozen=True, eq=False)
class AxisSize:
    """The size, not known before a run, of one axis of a value."""

    value: ir.Value
    axis: int


class KnownIntegers:
    """Follows values back to constants and shapes; remembers what it found."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._found: dict[ir.Value, Integers | None] = {}

    def of(self, value: ir.Value | None) -> Integers | None:
        """Returns the integers of a value with at most one axis, or None where some cannot be known."""
        if value is None:
            return None
        if value not in self._found:
            self._found[value] = None
            self._found[value] = self._follow(value)
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

    def _follow(self, value: ir.Value) -> Integers | None:
        constant = constant_argument(value)
        if constant is not None:
            fits = constant.dtype.kind in "iu" and constant.ndim <= 1 and constant.size <= MAX_ENTRIES
            return constant.astype(object) if fits else None
        node = value.producer()
        if node is None or node.domain != "" or len(node.outputs) != 1:
            return None
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return None
        result = None
        if node.op_type == "Shape":
            result = self._shape(node)
        elif node.op_type == "Cast":
            result = self._cast(node)
        elif node.op_type in _MOVING:
            result = self._moved(node)
        elif node.op_type in _ARITHMETIC:
            result = self._computed(node)
        return result if result is not None and result.ndim <= 1 and result.size <= MAX_ENTRIES else None

    def _shape(self, node: ir.Node) -> Integers | None:
        source = input_at(node, 0)
        if source is None or source.shape is None:
            return None
        sizes = [size if isinstance(size, int) else AxisSize(source, axis) for axis, size in enumerate(source.shape)]
        bounds = [node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end")]
        return _objects(sizes[slice(*bounds)])

    def _cast(self, node: ir.Node) -> Integers | None:
        source, dtype = self.of(input_at(node, 0)), self.dtype_of(node.outputs[0])
        if source is None or dtype is None or dtype not in (np.int32, np.int64):
            return None
        wrapped = [entry if isinstance(entry, AxisSize) else _wrapped(entry, dtype) for entry in source.reshape(-1)]
        return _objects(wrapped).reshape(source.shape)

    def _moved(self, node: ir.Node) -> Integers | None:
        """Where entries go is found by moving their positions."""
        entries: list[Any] = []
        arrays: list[npt.NDArray[Any] | None] = []
        for index, value in enumerate(node.inputs):
            known = self.of(value)
            if value is None:
                arrays.append(None)
            elif known is None:
                return None
            elif index == 0 or node.op_type == "Concat":
                arrays.append(np.arange(len(entries), len(entries) + known.size).reshape(known.shape))
                entries += known.reshape(-1).tolist()
            elif _are_numbers(known):
                arrays.append(known.astype(self.dtype_of(value)))
            else:
                return None
        found = evaluate(node, arrays, self._opset)
        return _objects(entries)[found[0].reshape(-1)].reshape(found[0].shape) if found else None

    def _computed(self, node: ir.Node) -> Integers | None:
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


def _objects(entries: list[Any]) -> Integers:
    array = np.empty(len(entries), dtype=object)
    array[:] = entries
    return array


def _wrapped(entry: int, dtype: np.dtype[Any]) -> int:
    bits = 8 * dtype.itemsize
    return (entry + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _are_numbers(entries: Integers) -> bool:
    return not any(isinstance(entry, AxisSize) for entry in entries.reshape(-1))
