"""What a graph would compute from its weights alone at every run, computed once: a resampled position embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import ModelProto, NodeProto, helper

from vlm_export.graph.ir_version import allow_plain_initializers
from vlm_export.graph.numpy_dtypes import is_plain_number
from vlm_export.graph.passes.dead_code import remove_dead_code
from vlm_export.graph.passes.rewiring import names_used

Array: TypeAlias = npt.NDArray[Any]
# Runs a graph of one node: feeds by name → its outputs, or None where the engine cannot run it.
Evaluate: TypeAlias = Callable[[ModelProto, Mapping[str, Array]], "Sequence[Array] | None"]

LIMIT_BYTES = 64 << 20
# Nodes that are worth folding. Those that only move or convert weights are not: folded, each would hold a second copy.
_SEEDS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "Resize"})
RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def fold_constants(
    model: ir.Model, evaluate: Evaluate, limit_bytes: int = LIMIT_BYTES, *, everything: bool = False
) -> int:
    """Folds products, convolutions and resizes of constants, and what follows from them alone, in place.

    The nodes before them are computed for them, and stay where others read them. What makes an output of the graph
    stays too, as does what would exceed the limit or what `evaluate` does not run.

    Args:
        limit_bytes: of all folded values together, and of each value on the way to them: memory stays flat.
        everything: also nodes that only move or convert constants.

    Returns:
        How many initializers took the place of nodes.
    """
    fold = _Fold(model, evaluate, limit_bytes, everything)
    for node in model.graph:
        fold.visit(node)
    for value, array in fold.values.items():
        _replace(value, array, model.graph)
    if fold.nodes:
        model.graph.remove(fold.nodes, safe=True)
        remove_dead_code(model)
    allow_plain_initializers(model)
    return len(fold.values)


class _Fold:
    """Visits nodes in the order of the graph.

    Attributes:
        nodes: those that can go.
        values: their outputs that other nodes read, computed.
    """

    def __init__(self, model: ir.Model, evaluate: Evaluate, limit_bytes: int, everything: bool) -> None:
        self._everything = everything
        self._model, self._evaluate, self._limit_bytes = model, evaluate, limit_bytes
        self.nodes: set[ir.Node] = set()
        self.values: dict[ir.Value, Array] = {}
        self._constants: set[ir.Value] = set()
        self._used = names_used(model)

    def visit(self, node: ir.Node) -> None:
        inputs = _inputs(node)
        if not _is_foldable(node, self._used) or not all(
            value in self._constants or _is_weight(value) for value in inputs
        ):
            return
        self._constants.update(node.outputs)
        starts = self._everything or node.op_type in _SEEDS
        if not starts and not any(value in self.values for value in inputs):
            return
        known = dict(self.values)
        held = {*self.values, *node.outputs}
        if not self._compute(node, known) or self._bytes(known, held) > self._limit_bytes:
            return
        self.nodes.add(node)
        self.values |= {value: known[value] for value in node.outputs if value.uses()}
        for value in inputs:
            if all(user in self.nodes for user, _ in value.uses()):
                self.values.pop(value, None)

    def _compute(self, node: ir.Node, known: dict[ir.Value, Array]) -> bool:
        """Adds the node's outputs to `known`, and those of the nodes before it; False where that is not to be had."""
        if _stated_bytes(node) > self._limit_bytes:
            return False
        for value in _inputs(node):
            producer = value.producer()
            if value not in known and producer is not None and not self._compute(producer, known):
                return False
        feeds = {str(value.name): known[value] if value in known else _weight(value) for value in _inputs(node)}
        # Neither numpy nor an engine's Python interface has the narrow types.
        if not all(is_plain_number(array.dtype) for array in feeds.values()):
            return False
        if node.op_type in ("Div", "Mod") and _traps(*feeds.values()):
            return False
        arrays = self._evaluate(_model_of_one(node, feeds, self._model), feeds)
        outputs = [value for value in node.outputs if value.name]
        if arrays is None or not all(map(_is_value, outputs, arrays)):
            return False
        known.update(zip(outputs, arrays, strict=True))
        return self._bytes(known, outputs) <= self._limit_bytes

    @staticmethod
    def _bytes(known: Mapping[ir.Value, Array], values: Iterable[ir.Value]) -> int:
        return sum(known[value].nbytes for value in values if value in known)


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _is_foldable(node: ir.Node, used: set[str]) -> bool:
    has_graphs = any(
        entry.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for entry in node.attributes.values()
    )
    makes_output = any(value.is_graph_output() or value.name in used for value in node.outputs)
    return node.domain == "" and node.op_type not in RANDOM and not has_graphs and not makes_output


def _is_weight(value: ir.Value) -> bool:
    # An initializer that is an input, too, is only that input's default.
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def _weight(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _traps(dividend: Array, divisor: Array | None = None) -> bool:
    """Whether a division of integers ends the process: by 0, or of the smallest by -1."""
    divisor = dividend if divisor is None else divisor
    if divisor.dtype.kind not in "iu":
        return False
    smallest = np.iinfo(dividend.dtype).min
    return bool((divisor == 0).any() or (smallest < 0 and (divisor == -1).any() and (dividend == smallest).any()))


def _is_value(value: ir.Value, array: object) -> bool:
    """Whether an initializer can hold it: no list, as sequences are, no strings, and no bytes that stand for others."""
    if not isinstance(array, np.ndarray) or not is_plain_number(array.dtype):
        return False
    return value.dtype is None or value.dtype.numpy() == array.dtype


def _stated_bytes(node: ir.Node) -> int:
    """Of the outputs whose shapes the graph knows: what is too large is not even computed."""
    total = 0.0
    for value in node.outputs:
        if value.shape is not None and value.shape.is_static() and value.dtype is not None:
            total += prod(value.shape.numpy()) * value.dtype.itemsize
    return int(total)


def _model_of_one(node: ir.Node, feeds: Mapping[str, Array], model: ir.Model) -> ModelProto:
    """The node alone; weights are its inputs and never pass through a protobuf."""
    proto: NodeProto = ir.to_proto(node)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    graph = helper.make_graph([proto], "node", inputs, outputs)
    opset = helper.make_opsetid("", model.graph.opset_imports[""])
    return helper.make_model(graph, opset_imports=[opset], ir_version=model.ir_version)


def _replace(value: ir.Value, array: Array, graph: ir.Graph) -> None:
    tensor = ir.tensor(array, name=value.name)
    shape = ir.Shape(array.shape)
    folded = ir.Value(name=value.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    folded.metadata_props.update(value.metadata_props)
    folded.meta.update(value.meta)
    ir.convenience.replace_all_uses_with(value, folded)
    graph.register_initializer(folded)
