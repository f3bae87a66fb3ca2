"""What a graph would compute from its weights alone at every run, computed once: a resampled position embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx import ModelProto, NodeProto, helper

from vlm_export.graph.core.dead_code import remove_dead_code
from vlm_export.graph.core.names import inputs_of, names_used, subgraphs_of
from vlm_export.graph.core.onnxruntime_session import Array, run_in_onnxruntime
from vlm_export.graph.core.operators import RANDOM
from vlm_export.graph.core.replace_uses import add_initializer, replace_uses
from vlm_export.graph.core.skeleton import allow_plain_initializers
from vlm_export.graph.core.tensors import is_plain_number

# Runs a graph of one node: feeds by name → its outputs, or None where the engine cannot run it.
Evaluate: TypeAlias = Callable[[ModelProto, Mapping[str, Array]], "Sequence[Array] | None"]

LIMIT_BYTES = 64 << 20
_MADE_OF = "vlm_export.made_of"
# How much larger folding everything may make a model, if nothing else is asked for.
GROWTH_BYTES = 1 << 20
# Engines fuse these with what reads them: a quantised weight that is folded is four times as large, and no longer one.
_QUANTISATION = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
# Nodes that are worth folding. Those that only move or convert weights are not: folded, each would hold a second copy.
_SEEDS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "Resize"})


def fold_constants(
    model: ir.Model,
    evaluate: Evaluate,
    limit_bytes: int = LIMIT_BYTES,
    *,
    everything: bool = False,
    growth_bytes: int | None = None,
) -> Folded:
    """Folds products, convolutions and resizes of constants, and what follows from them alone, in place.

    The nodes before them are computed for them, and stay where others read them. What makes an output of the graph
    stays too, as does what would exceed a limit, what `evaluate` does not run, and what quantises or dequantises.
    onnxscript's folding limits each value, not how much all of them add to the model, and does not tell which weights
    a value was computed from.

    Args:
        limit_bytes: of all folded values together, and of each value on the way to them: memory stays flat.
        everything: also nodes that only move or convert constants.
        growth_bytes: how much more all folded values may take than the constants that they were computed from; None:
            as much as `limit_bytes` allows.
    """
    before = _weight_bytes(model)
    fold = _Fold(model, evaluate, limit_bytes, everything, growth_bytes)
    for node in model.graph:
        fold.visit(node)
    for value, array in fold.values.items():
        _replace(value, array, model.graph, fold.made_of[value])
    if fold.nodes:
        model.graph.remove(fold.nodes, safe=True)
        remove_dead_code(model)
    allow_plain_initializers(model)
    return Folded(len(fold.values), _weight_bytes(model) - before, tuple(fold.left))


def _weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


@dataclass(frozen=True)
class Folded:
    """What folding did.

    Attributes:
        initializers: that took the place of nodes.
        more_bytes: of weights than before; negative: fewer.
        left: tensors whose nodes stay because their values would make the model too large.
    """

    initializers: int
    more_bytes: int = 0
    left: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.initializers > 0


class _Fold:
    """Visits nodes in the order of the graph, and computes what others read of those that can go."""

    def __init__(
        self, model: ir.Model, evaluate: Evaluate, limit_bytes: int, everything: bool, growth_bytes: int | None
    ) -> None:
        self._everything, self._growth_bytes = everything, growth_bytes
        self._grown: dict[ir.Value, int] = {}
        self._model, self._evaluate, self._limit_bytes = model, evaluate, limit_bytes
        self.nodes: set[ir.Node] = set()
        self.left: list[str] = []
        self.values: dict[ir.Value, Array] = {}
        self.made_of: dict[ir.Value, tuple[str, ...]] = {}
        self._constants: set[ir.Value] = set()
        self._used = names_used(model)

    def visit(self, node: ir.Node) -> None:
        inputs = inputs_of(node)
        if not _is_foldable(node, self._used):
            return
        if not all(value in self._constants or _weight(value) is not None for value in inputs):
            return
        self._constants.update(node.outputs)
        starts = self._everything or node.op_type in _SEEDS
        if not starts and not any(value in self.values for value in inputs):
            return
        known = dict(self.values)
        held = {*self.values, *node.outputs}
        if self._grows_too_much(_stated_bytes(node), inputs):
            self.left.append(str(node.outputs[0].name))
            return
        if not self._compute(node, known) or self._bytes(known, held) > self._limit_bytes:
            if _stated_bytes(node) > self._limit_bytes:
                self.left.append(str(node.outputs[0].name))
            return
        if self._grows_too_much(self._bytes(known, node.outputs), inputs):
            self.left.append(str(node.outputs[0].name))
            return
        self.nodes.add(node)
        for value in node.outputs:
            self._grown[value] = known[value].nbytes - sum(map(self._held_bytes, inputs)) if value in known else 0
        self.values |= {value: known[value] for value in node.outputs if value.uses()}
        made_of = tuple(sorted({name for value in inputs for name in self._sources(value)}))
        self.made_of |= dict.fromkeys(node.outputs, made_of)
        for value in inputs:
            if all(user in self.nodes for user, _ in value.uses()):
                self.values.pop(value, None)

    def _sources(self, value: ir.Value) -> tuple[str, ...]:
        """Names of the initializers behind a constant."""
        if value in self.made_of:
            return self.made_of[value]
        producer = value.producer()
        if producer is None:
            return made_of(value) or (str(value.name),)
        return tuple(name for before in inputs_of(producer) for name in self._sources(before))

    def _compute(self, node: ir.Node, known: dict[ir.Value, Array]) -> bool:
        """Adds the node's outputs to `known`, and those of the nodes before it; False where that is not to be had."""
        if _stated_bytes(node) > self._limit_bytes:
            return False
        for value in inputs_of(node):
            producer = value.producer()
            if value not in known and producer is not None and not self._compute(producer, known):
                return False
        feeds: dict[str, Array] = {}
        for value in inputs_of(node):
            tensor = _weight(value)
            feeds[str(value.name)] = known[value] if tensor is None else np.asarray(tensor.numpy())
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

    def _held_bytes(self, value: ir.Value) -> int:
        """What a constant takes in the model as it is so far."""
        held = self.values.get(value) if value in self.values else _weight(value)
        return 0 if held is None else held.nbytes

    def _grows_too_much(self, made_bytes: int, inputs: Sequence[ir.Value]) -> bool:
        if self._growth_bytes is None:
            return False
        now = sum(grown for value, grown in self._grown.items() if value in self.values)
        return max(now, 0) + made_bytes - sum(map(self._held_bytes, dict.fromkeys(inputs))) > self._growth_bytes

    @staticmethod
    def _bytes(known: Mapping[ir.Value, Array], values: Iterable[ir.Value]) -> int:
        return sum(known[value].nbytes for value in values if value in known)


def _is_foldable(node: ir.Node, used: set[str]) -> bool:
    makes_output = any(value.is_graph_output() or value.name in used for value in node.outputs)
    is_kept = node.op_type in RANDOM or node.op_type in _QUANTISATION
    return node.domain == "" and not is_kept and not makes_output and not any(True for _ in subgraphs_of(node))


def _weight(value: ir.Value) -> ir.TensorProtocol | None:
    # An initializer that is an input, too, is only that input's default.
    return value.const_value if value.is_initializer() and not value.is_graph_input() else None


def _traps(dividend: Array, divisor: Array | None = None) -> bool:
    """Whether a division of integers, also of one by itself, ends the process: by 0, or of the smallest by -1."""
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


def made_of(value: ir.Value) -> tuple[str, ...]:
    """Returns names of the initializers that a folded one was computed from; () for any other value."""
    found: tuple[str, ...] = value.meta.get(_MADE_OF, ())
    return found


def _replace(value: ir.Value, array: Array, graph: ir.Graph, sources: tuple[str, ...]) -> None:
    tensor = ir.tensor(array, name=value.name)
    name, value.name = str(value.name), None
    folded = add_initializer(graph, tensor, name)
    folded.metadata_props.update(value.metadata_props)
    folded.meta.update(value.meta)
    folded.meta[_MADE_OF] = sources
    replace_uses(value, folded)


def fold_all_constants(
    model: ir.Model, limit_bytes: int = LIMIT_BYTES, growth_bytes: int | None = GROWTH_BYTES
) -> Folded:
    """Folds, in place, what nodes of the main graph make of constants alone; limits are those of `fold_constants`."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return fold_constants(model, run_in_onnxruntime, limit_bytes, everything=True, growth_bytes=growth_bytes)
