"""Attention for opsets without `Attention` (before 23), and GELU's tanh form for those without `Gelu` (before 20)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# From this opset on there is an operator for both forms.
GELU_OPSET = 20
_CUBIC, _SCALE = 0.044715, math.sqrt(2 / math.pi)


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query · keyᵀ / √d + mask) · value, all float (B, H, T, d); equal to torch's operator.

    Raises:
        NotImplementedError: dropout, `is_causal` or grouped queries, which no Part uses: they state their mask.

    The TorchScript exporter has no form of torch's operator below opset 14, and both exporters scale query and key
    separately and compute √d in the graph; here the query alone is scaled, by a constant.
    """
    if dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("attention with dropout, is_causal or grouped queries is not lowered")
    factor = float(int(query.shape[-1])) ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    attended: Tensor = scores.softmax(dim=-1) @ value
    return attended


@contextmanager
def lower_attention() -> Iterator[None]:
    """Within the context, torch's attention operator is `composed_attention`."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = composed_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def composed_tanh_gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), the cube as products: torch's own is a `Pow`.

    Source of the formula: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv:1606.08415). ONNX Runtime makes one
    `FastGelu` of this order (microsoft/onnxruntime `fast_gelu_fusion.cc`, first formula); of torch's it makes none.
    """
    inner = (1.0 + (_CUBIC * x) * x) * (_SCALE * x)
    return (1.0 + torch.tanh(inner)) * (0.5 * x)


@contextmanager
def lower_tanh_gelu() -> Iterator[None]:
    """Within the context, torch's GELU in its tanh form is `composed_tanh_gelu`; the exact form stays torch's."""
    original = F.gelu

    def gelu(input: Tensor, approximate: str = "none") -> Tensor:
        return composed_tanh_gelu(input) if approximate == "tanh" else original(input, approximate=approximate)

    F.gelu = gelu
    try:
        yield
    finally:
        F.gelu = original
