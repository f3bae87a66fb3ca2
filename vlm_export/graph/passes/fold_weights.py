"""Weights changed once, when they are written, instead of at every run: batch norms folded, transposes done.

The new tensors are lazy: one at a time is computed while the file is written, so memory stays flat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_export.graph.core.replace_uses import add_initializer, replace_uses
from vlm_export.graph.core.tensors import transposed_tensor

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Norm:
    """The constant tensors of a BatchNormalization: y = (x - mean) · gamma / √(variance + epsilon) + beta."""

    gamma: ir.TensorProtocol
    beta: ir.TensorProtocol
    mean: ir.TensorProtocol
    variance: ir.TensorProtocol
    epsilon: float

    def factor(self) -> npt.NDArray[np.float64]:
        return self.gamma.numpy().astype(np.float64) / np.sqrt(self.variance.numpy().astype(np.float64) + self.epsilon)


def fold_batch_norms(model: ir.Model) -> int:
    """Folds each BatchNormalization that alone follows a Conv with constant weights, in place; returns how many.

    The folded weights are computed in float64. onnxscript's rule holds all of them at once, in float32, and leaves a
    convolution that shares its weight.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        conv = node.inputs[0].producer() if node.op_type == "BatchNormalization" and node.inputs[0] else None
        if conv is None or conv.op_type != "Conv" or len(node.outputs) != 1:
            continue
        if len(conv.outputs[0].uses()) != 1 or conv.outputs[0].is_graph_output():
            continue
        values = (*node.inputs[1:5], conv.inputs[1])
        constants = [value.const_value for value in values if value and value.const_value is not None]
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        if len(constants) != len(values) or (bias is not None and bias.const_value is None):
            continue
        gamma, beta, mean, variance, weight = constants
        norm = _Norm(gamma, beta, mean, variance, node.attributes.get_float("epsilon", 1e-5))
        _fold(graph, conv, weight, bias.const_value if bias else None, norm)
        replace_uses(node.outputs[0], conv.outputs[0])
        graph.remove(node, safe=True)
        # It may be an output of the graph, which others find by its name.
        conv.outputs[0].name = node.outputs[0].name
        count += 1
    return count


def _fold(
    graph: ir.Graph, conv: ir.Node, weight: ir.TensorProtocol, bias: ir.TensorProtocol | None, norm: _Norm
) -> None:
    name = (conv.inputs[1].name if conv.inputs[1] else None) or "conv.weight"
    channels = ir.Shape(weight.shape.numpy()[:1])
    folded_weight = _lazy(graph, f"{name}.folded", ir.Shape(weight.shape.numpy()), partial(_fold_weight, weight, norm))
    stem = name.removesuffix(".weight")
    folded_bias = _lazy(graph, f"{stem}.bias.folded", channels, partial(_fold_bias, bias, norm))
    conv.replace_input_with(1, folded_weight)
    if len(conv.inputs) < 3:
        conv.resize_inputs(3)
    conv.replace_input_with(2, folded_bias)


def _fold_weight(weight: ir.TensorProtocol, norm: _Norm) -> Array:
    values = weight.numpy()
    # Channel by channel, so that the float64 intermediate is one filter's.
    folded = np.empty(values.shape, dtype=np.float32)
    for channel, factor in enumerate(norm.factor()):
        folded[channel] = values[channel].astype(np.float64) * factor
    return folded


def _fold_bias(bias: ir.TensorProtocol | None, norm: _Norm) -> Array:
    start = bias.numpy().astype(np.float64) if bias is not None else 0.0
    shifted: Array = ((start - norm.mean.numpy()) * norm.factor() + norm.beta.numpy()).astype(np.float32)
    return shifted


def _lazy(graph: ir.Graph, name: str, shape: ir.Shape, compute: Callable[[], Array]) -> ir.Value:
    # Convolutions may share a weight, and then each has its own norm.
    repeats = sum(key == name or key.startswith(f"{name}.") for key in graph.initializers)
    name = f"{name}.{repeats}" if repeats else name
    lazy = ir.LazyTensor(lambda: ir.Tensor(compute()), dtype=ir.DataType.FLOAT, shape=shape, name=name)
    return add_initializer(graph, lazy, name)


def fold_weight_transposes(model: ir.Model) -> int:
    """Replaces each Transpose of an initializer by a transposed initializer, in place; returns how many."""
    graph = model.graph
    folded: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        name = weight.name if weight is not None else None
        tensor = weight.const_value if weight is not None else None
        # An output of the graph needs a node that makes it.
        if name is None or name not in graph.initializers or tensor is None or node.outputs[0].is_graph_output():
            continue
        perm = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(tensor.shape))))))
        key = (name, perm)
        if key not in folded:
            folded[key] = _transposed_initializer(graph, name, tensor, perm)
        replace_uses(node.outputs[0], folded[key])
        graph.remove(node, safe=True)
    for name, _ in folded:
        if name in graph.initializers and not graph.initializers[name].uses():
            del graph.initializers[name]
    return len(folded)


def _transposed_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, perm: tuple[int, ...]) -> ir.Value:
    # The plain transpose of a matrix keeps its parameter's name recognisable to readers of the graph.
    new_name = f"{name}.transposed" if perm == tuple(reversed(range(len(perm)))) else f"{name}.{perm}"
    return add_initializer(graph, transposed_tensor(tensor, perm, new_name), new_name)
