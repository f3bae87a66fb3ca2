"""Arguments that a graph computes though they are fixed, made constants: shapes, axes, repeats, pads, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.names import fresh_name, nested_graphs, root_graphs, taken_names
from vlm_export.graph.core.replace_uses import add_constant_node, add_initializer
from vlm_export.graph.core.skeleton import allow_plain_initializers
from vlm_export.graph.core.tensors import constant_tensor, input_at
from vlm_export.graph.passes.dead_code import remove_dead_code
from vlm_export.graph.passes.known_integers import AxisSize, KnownIntegers

# Operator → inputs that are arguments: integers that decide shapes or axes.
ARGUMENTS: Mapping[str, Sequence[int]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}


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
        self._known = KnownIntegers(root.opset_imports.get("", 0))
        self._made: dict[tuple[tuple[int, ...], tuple[int, ...], ir.DataType], ir.Value] = {}

    def replace(self) -> int:
        return sum(
            self._replace(node, index)
            for node in list(self._graph)
            if node.domain == ""
            for index in ARGUMENTS.get(node.op_type, ())
        )

    def _replace(self, node: ir.Node, index: int) -> bool:
        value = input_at(node, index)
        if value is None or constant_tensor(value) is not None:
            return False
        known, dtype = self._known.of(value), self._known.dtype_of(value)
        if known is None or dtype is None:
            return False
        if any(isinstance(entry, AxisSize) for entry in known.reshape(-1)):
            if node.op_type != "Reshape":
                return False
            sizes = _copied_axes(node, known.reshape(-1).tolist())
            if sizes is None:
                return False
            known = np.array(sizes, dtype=object)
        array = known.astype(dtype)
        node.replace_input_with(index, self._constant(array, str(value.name), node))
        return True

    def _constant(self, array: np.ndarray[tuple[int, ...], np.dtype[Any]], base: str, reader: ir.Node) -> ir.Value:
        tensor = ir.tensor(array)
        key = (tuple(array.shape), tuple(array.reshape(-1).tolist()), tensor.dtype)
        if not self._in_function and key in self._made:
            return self._made[key]
        tensor.name = fresh_name(f"{base}.static", self._taken)
        if self._in_function:
            return add_constant_node(reader, tensor, tensor.name)
        self._made[key] = add_initializer(self._graph, tensor, tensor.name)
        return self._made[key]


def _copied_axes(node: ir.Node, entries: list[int | AxisSize]) -> list[int] | None:
    """The sizes of a Reshape with 0 for axes that it leaves as they are; None where another axis is not fixed."""
    allowzero = node.attributes.get("allowzero")
    if allowzero is not None and (allowzero.is_ref() or allowzero.as_int() != 0):
        return None
    sizes: list[int] = []
    for axis, entry in enumerate(entries):
        if not isinstance(entry, AxisSize):
            sizes.append(entry)
        elif entry.value is node.inputs[0] and entry.axis == axis:
            sizes.append(0)
        else:
            return None
    return sizes
