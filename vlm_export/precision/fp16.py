"""A graph in half precision: float16 weights and activations, float32 at the border and where the rules want it."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from vlm_export.errors import InputError
from vlm_export.precision.fp16_plan import Plan, float_inputs, is_float, plan_fp16
from vlm_export.precision.fp16_rules import LARGEST_FLOAT16, makes_sequences, overflows

_ROUNDED_FROM = "vlm_export.rounded_from"
_SUFFIXES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def convert_to_fp16(model: ir.Model, wide: Collection[str] = ()) -> ir.Model:
    """A copy in half precision whose inputs and outputs are the model's own; the model is left as it was.

    Weights are converted one at a time, when they are written: memory stays flat.

    Args:
        wide: names of values that float16 does not hold, as measured (`fp16_ranges`): what makes or reads them stays
            in float32.

    Raises:
        InputError: the graph has nested graphs or values of unknown dtype; when it is written, also for a weight that
            float16 cannot hold.
    """
    work, plan = planned_copy(model, wide)
    _Conversion(work.graph, plan).run()
    return work


def planned_copy(model: ir.Model, wide: Collection[str] = ()) -> tuple[ir.Model, Plan]:
    """A copy as it is before its conversion, and the plan for it; arguments and errors as in `convert_to_fp16`."""
    work = model.clone()
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(work)
    _require_dtypes(work)
    work.graph.sort()
    return work, plan_fp16(work, wide)


def rounded_from(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Names of the initializers that the conversion rounded → what they held before; of its result, not of a file."""
    values = model.graph.initializers.items()
    return {name: value.meta[_ROUNDED_FROM] for name, value in values if _ROUNDED_FROM in value.meta}


def _require_dtypes(model: ir.Model) -> None:
    for node in model.graph:
        kinds = {entry.type for entry in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            raise InputError(
                "half precision does not reach into nested graphs",
                where=f"node {node.name or node.op_type}",
                expected="a graph without If, Loop and Scan",
                got=node.op_type,
                fix="export with --precision fp32",
            )
    if _values_without_dtype(model):
        passes.ShapeInferencePass()(model)
        _state_sequences(model.graph)
    if unknown := _values_without_dtype(model):
        raise InputError(
            "half precision needs every value's dtype",
            where=f"value {unknown[0].name}",
            expected="a graph that ONNX's shape inference completes",
            got=f"{len(unknown)} values of unknown dtype",
            fix="export without --no-simplify, or with --precision fp32",
        )


def _state_sequences(graph: ir.Graph) -> None:
    """The pass calls a sequence of tensors a tensor."""
    for node in graph:
        for value, is_sequence in zip(
            node.outputs, makes_sequences(node, graph.opset_imports.get("", 0)), strict=False
        ):
            if is_sequence and isinstance(value.type, ir.TensorType):
                value.type = ir.SequenceType(value.type)


def _values_without_dtype(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs if value.name and value.dtype is None]


class _Conversion:
    """Rewrites one graph by its plan.

    Attributes:
        original: the float32 values, whose dtype changes on the way.
        names: of all values, so that new ones are unique.
    """

    def __init__(self, graph: ir.Graph, plan: Plan) -> None:
        self._graph, self._plan = graph, plan
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        self._original = {value for value in values if is_float(value)}
        self._names = {value.name for value in values}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        readers = {node: float_inputs(node) for node in self._graph}
        for value in list(self._graph.initializers.values()):
            if is_float(value) and value.name not in self._plan.float32_weights:
                _halve(value)
        for node in list(self._graph):
            self._convert(node, readers[node])
        for index, value in enumerate(self._graph.outputs):
            if value in self._original and value.dtype == ir.DataType.FLOAT16:
                self._graph.outputs[index] = self._named_output(value)

    def _convert(self, node: ir.Node, inputs: list[ir.Value]) -> None:
        dtype = ir.DataType.FLOAT if node in self._plan.float32_nodes else ir.DataType.FLOAT16
        for position, value in enumerate(node.inputs):
            if value is not None and value in inputs and value.dtype != dtype:
                node.replace_input_with(position, self._cast(value, dtype, before=node))
        if dtype == ir.DataType.FLOAT:
            return
        for output in node.outputs:
            if output in self._original:
                # A type of its own: the copy shares the model's.
                output.type = ir.TensorType(dtype)
        if node.op_type == "Attention" and "softmax_precision" not in node.attributes:
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(ir.DataType.FLOAT))

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """The value in the other precision, computed once: the first reader comes before all others."""
        key = (value, dtype)
        if key not in self._casts:
            node = _cast_node(value, dtype, self._unique(f"{value.name}.{_SUFFIXES[dtype]}"))
            self._graph.insert_before(before, node)
            self._casts[key] = node.outputs[0]
        return self._casts[key]

    def _named_output(self, value: ir.Value) -> ir.Value:
        """float32 under the output's own name."""
        name = str(value.name)
        value.name = self._unique(f"{name}.float16")
        node = _cast_node(value, ir.DataType.FLOAT, name)
        self._graph.append(node)
        ready = self._casts.get((value, ir.DataType.FLOAT))
        if ready is not None:
            # The graph has it in float32 already, under a name of the conversion.
            maker = ready.producer()
            assert maker is not None
            self._graph.remove(node, safe=True)
            ready.name = name
            return ready
        return node.outputs[0]

    def _unique(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._names:
            number += 1
            unique = f"{name}.{number}"
        self._names.add(unique)
        return unique


def _cast_node(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=f"cast {name}")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(dtype)
    return node


def _halve(weight: ir.Value) -> None:
    tensor, name = weight.const_value, weight.name
    if tensor is None or name is None:
        return
    shape = ir.Shape(tensor.shape.numpy())
    weight.const_value = ir.LazyTensor(
        partial(_half_tensor, tensor, name), dtype=ir.DataType.FLOAT16, shape=shape, name=name
    )
    weight.type = ir.TensorType(ir.DataType.FLOAT16)
    weight.meta[_ROUNDED_FROM] = tensor


def _half_tensor(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    values = tensor.numpy()
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if bool(np.isinf(half).any()) and overflows(values):
        finite = np.abs(values[np.isfinite(values)])
        raise InputError(
            "a weight is beyond the range of float16",
            where=f"tensor {name}",
            expected=f"at most {LARGEST_FLOAT16:g} in size",
            got=f"{float(finite.max()):g}",
            fix="export with --precision fp32",
        )
    return ir.Tensor(half, name=name)
