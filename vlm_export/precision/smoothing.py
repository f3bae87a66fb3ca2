"""Outliers of activations moved into weights before both are quantised: SmoothQuant (Xiao et al., arXiv 2211.10438).

A norm's channel is divided by a number, and the rows of the weights that read it are multiplied by the same, so that
one scale for all channels rounds none of them away. The numbers are powers of two: no float32 value is rounded by
them, the smoothed graph computes what it did, and whoever reads both graphs finds them again. Own code: onnxruntime's
(`SmoothQuant` of `quantize_static`) is neural-compressor's, which holds the whole model several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
STRENGTH = 0.5
"""How much of the outliers moves, from 0 to 1: the paper's alpha, by its default."""
_MOST_DOUBLINGS = 10
_SMOOTHED_BY = "vlm_export.smoothed_by"


@dataclass(frozen=True)
class Smoothable:
    """A norm that only products with constant matrices read, and nothing else reads its weights or theirs."""

    norm: ir.Node
    products: tuple[ir.Node, ...]

    @property
    def value(self) -> str:
        """Name of the norm's output, whose channels are smoothed."""
        return str(self.norm.outputs[0].name)


def smoothable(graph: ir.Graph) -> list[Smoothable]:
    """The norms before q/k/v and fc1, in the graph's order; Gemm was split (`split_gemms`)."""
    found = []
    for node in graph:
        if node.op_type != "LayerNormalization" or node.domain or node.outputs[0].is_graph_output():
            continue
        products = tuple(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
        if not products or any(product.op_type != "MatMul" for product in products):
            continue
        if all(map(_is_own, (*node.inputs[1:], *(product.inputs[1] for product in products)))):
            found.append(Smoothable(node, products))
    return found


def _is_own(value: ir.Value | None) -> bool:
    """A float32 initializer that one node reads."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.dtype == ir.DataType.FLOAT
        and len(value.uses()) == 1
        and not value.is_graph_input()
    )


def smooth(graph: ir.Graph, largest: Mapping[str, Array]) -> None:
    """Moves outliers in place, of the norms that `largest` names.

    Args:
        largest: value of `smoothable` → largest magnitude of each channel (C,), as calibrated.
    """
    for one in smoothable(graph):
        if one.value not in largest:
            continue
        weights = [product.inputs[1] for product in one.products]
        rows = np.max([np.abs(_array(weight)).max(axis=1) for weight in weights], axis=0)
        factors = _factors(largest[one.value], rows, _array(one.norm.inputs[1]))
        if np.any(factors != 1):
            name = str(one.norm.inputs[1].name)  # type: ignore[union-attr]
            for value in one.norm.inputs[1:]:
                _scale(value, 1 / factors, name)
            for value in weights:
                _scale(value, factors[:, None], name)


def smoothed_by(value: ir.Value) -> str | None:
    """Name of the norm's weight that tells by how much an initializer was scaled; None where it was not."""
    name = value.meta.get(_SMOOTHED_BY)
    return None if name is None else str(name)


def _factors(activations: Array, rows: Array, norm: Array) -> Array:
    """What the norm's channels are divided by: powers of two, float32 (C,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = STRENGTH * np.log2(activations) - (1 - STRENGTH) * np.log2(rows)
    # A channel that is always zero, or that nobody reads, wants none; and only differences between channels matter.
    known = np.isfinite(wanted) & (norm != 0)
    if not known.any():
        return np.ones(len(norm), np.float32)
    doublings = np.fix(wanted - np.median(wanted[known]))
    return np.exp2(np.where(known, np.clip(doublings, -_MOST_DOUBLINGS, _MOST_DOUBLINGS), 0)).astype(np.float32)


def _scale(value: ir.Value | None, factors: Array, norm: str) -> None:
    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.LazyTensor(
        partial(_scaled, tensor, factors),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(value.name),
    )
    value.meta[_SMOOTHED_BY] = norm


def _scaled(tensor: ir.TensorProtocol, factors: Array) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy() * factors, name=tensor.name)


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy()
