"""Sizes of every tensor of a graph at given sizes of its inputs, one node at a time, so that a misfit has a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from vlm_export.graph.core.names import subgraphs_of
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.core.operators import LIKE_FIRST_INPUT, RANDOM, evaluate
from vlm_export.graph.core.tensors import constant_argument, input_at, is_plain_number

Sizes: TypeAlias = "tuple[int, ...]"
# Of tensors that are followed by value: shapes, axes, masks of shapes.
_MAX_ENTRIES = 1024


class MisfitError(Exception):
    """A node whose inputs do not fit together at these sizes; the message says why."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        self.node, self.reason = node, reason
        super().__init__(reason)


class NodeSizes:
    """The sizes of tensors of the main graph, found by going through its nodes in order.

    What ONNX cannot tell (operators that it does not know, control flow, sizes that depend on values) stays unknown.
    The shapes of the model's values are overwritten: give a copy.
    """

    def __init__(self, model: ir.Model, sizes: Mapping[str, Sequence[int]]) -> None:
        """
        Args:
            sizes: input → its sizes; an input that is left out keeps what the model states.
        """
        self.model = model
        for graph_input in model.graph.inputs:
            if str(graph_input.name) in sizes:
                graph_input.shape = ir.Shape(sizes[str(graph_input.name)])
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
        self._contents: dict[ir.Value, Array | None] = {}

    def visit_all(self) -> MisfitError | None:
        """Visits all nodes, up to the first whose inputs do not fit together, which is returned."""
        try:
            for node in self.model.graph:
                self.visit(node)
        except MisfitError as error:
            return error
        return None

    def visit(self, node: ir.Node) -> None:
        """States the shapes of the node's outputs.

        Raises:
            MisfitError: the inputs have sizes that the operator does not take.
        """
        if node.domain != "" or any(True for _ in subgraphs_of(node)):
            self._like_first_input(node)
            return
        self._check(node)
        types = {str(value.name): _type_proto(value) for value in node.inputs if value is not None}
        outputs = [value for value in node.outputs if value.name]
        opset = self.model.opset_imports.get("", 0)
        if any(kind is None for kind in types.values()) or not onnx.defs.has(node.op_type, opset, ""):
            return
        data = {
            str(value.name): numpy_helper.from_array(known, str(value.name))
            for value in node.inputs
            if value is not None and (known := self.content(value)) is not None
        }
        try:
            found = onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, opset, ""),
                ir.to_proto(node),
                {name: kind for name, kind in types.items() if kind is not None},
                data,
                opset_imports=[onnx.helper.make_opsetid("", opset)],
                ir_version=self.model.ir_version,
            )
        except onnx.shape_inference.InferenceError as error:
            raise MisfitError(node, str(error).strip().splitlines()[-1]) from error
        except Exception:
            return
        for value in outputs:
            _state(value, found.get(str(value.name)))
        self._compute(node, opset)

    def content(self, value: ir.Value | None) -> Array | None:
        """Returns the values of a small tensor that depends on nothing but constants and sizes, or None of another
        one."""
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
        if node.op_type == "Shape" and (sizes := self.sizes(input_at(node, 0))) is not None:
            bounds = [node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end")]
            self._contents[node.outputs[0]] = np.array(sizes[slice(*bounds)], np.int64)
            return
        known = [self.content(value) for value in node.inputs]
        fits = all((sizes := self.sizes(value)) is None or prod(sizes) <= _MAX_ENTRIES for value in node.outputs)
        unknown = any(array is None and value is not None for array, value in zip(known, node.inputs, strict=True))
        if not known or unknown or not fits or node.op_type in RANDOM:
            return
        for value, array in zip(node.outputs, evaluate(node, known, opset) or (), strict=False):
            if array.size <= _MAX_ENTRIES:
                self._contents[value] = array
                value.shape = ir.Shape(array.shape)

    def sizes(self, value: ir.Value | None) -> Sizes | None:
        """Returns the sizes of a value, or None where they are not all known."""
        if value is None or value.shape is None or not value.shape.is_static():
            return None
        return tuple(value.shape.numpy())

    def _like_first_input(self, node: ir.Node) -> None:
        source = input_at(node, 0)
        if (node.domain, node.op_type) in LIKE_FIRST_INPUT and source is not None and source.shape is not None:
            node.outputs[0].shape = source.shape.copy()

    def _check(self, node: ir.Node) -> None:
        """What ONNX's own inference lets pass."""
        data, other = self.sizes(input_at(node, 0)), self.sizes(input_at(node, 1))
        if node.op_type == "Reshape" and data is not None:
            target = self.integers(input_at(node, 1))
            if target is not None and resolved(node, data, target) is None:
                reason = f"{prod(data)} elements in sizes {list(data)} cannot have the shape {target}"
                raise MisfitError(node, reason)
        if node.op_type == "Gemm" and data is not None and other is not None and len(data) == len(other) == 2:
            flags = [node.attributes[name].as_int() if name in node.attributes else 0 for name in ("transA", "transB")]
            if data[0 if flags[0] else 1] != other[1 if flags[1] else 0]:
                raise MisfitError(node, f"matrices of {list(data)} and {list(other)} cannot be multiplied")


def resolved(node: ir.Node, data: Sequence[int], target: Sequence[int]) -> list[int] | None:
    """Returns the sizes that a Reshape gives to data of these sizes, or None where they do not hold as many
    elements."""
    allows_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int() != 0
    sizes = list(target)
    if not allows_zero:
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
    if value.const_value is not None and value.is_initializer():
        tensor = value.const_value
        return onnx.helper.make_tensor_type_proto(int(tensor.dtype), list(tensor.shape.numpy()))
    if not isinstance(value.type, ir.TensorType):
        return None
    if value.shape is None:
        return onnx.helper.make_tensor_type_proto(int(value.type.dtype), None)
    dims = [size if isinstance(size, int) else size.value for size in value.shape]
    return onnx.helper.make_tensor_type_proto(int(value.type.dtype), dims)


def _state(value: ir.Value, found: onnx.TypeProto | None) -> None:
    if found is None or not found.HasField("tensor_type"):
        return
    kind = found.tensor_type
    if value.type is None and kind.elem_type:
        value.type = ir.TensorType(ir.DataType(kind.elem_type))
    if kind.HasField("shape"):
        value.shape = ir.Shape([dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim])
