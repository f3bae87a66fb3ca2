"""Scaled dot-product attention as two matrix products, for opsets without `Attention` (before 23)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor


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
