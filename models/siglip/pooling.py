"""Attention pooling of SigLIP and SigLIP 2. Source: transformers 5.23, models/siglip/modeling_siglip.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import MLP, CrossAttention, KeyValueProjection
from vlm_export.models.siglip.architecture import SiglipArchitecture


class AttentionPoolingHead(nn.Module):
    """Tokens float32 (B, P, D) → float32 (B, D): one learned query attends to all of them, and an MLP follows."""

    def __init__(self, width: int, heads: int, hidden: int, architecture: SiglipArchitecture) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.states = KeyValueProjection(width, width, heads)
        self.attention = CrossAttention(width, heads)
        self.norm = nn.LayerNorm(width, eps=architecture.eps)
        self.mlp = MLP(width, hidden, architecture.activation)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: float32, broadcast to (B, H, 1, P), added to the scores."""
        key, value = self.states(tokens)
        pooled = self.attention(self.probe.expand(tokens.shape[0], -1, -1), key, value, mask)
        pooled = pooled + self.mlp(self.norm(pooled))
        embeds: Tensor = pooled[:, 0]
        return embeds
