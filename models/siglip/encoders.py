"""SigLIP's two encoders as static-graph modules. Source: transformers 5.23, models/siglip/modeling_siglip.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import MLP, CrossAttention, KeyValueProjection, TransformerBlock, meta_modules
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.siglip.architecture import SiglipArchitecture, TextSizes, VisionSizes


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


class SiglipVisionTransformer(VisionTransformer):
    """pixel_values float32 (B, 3, S, S), normalised → image_embeds float32 (B, D), not normalised."""

    def __init__(self, architecture: SiglipArchitecture, sizes: VisionSizes) -> None:
        form = VitForm(
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            hidden=sizes.hidden,
            patch_size=sizes.patch_size,
            grid=sizes.image_size // sizes.patch_size,
            activation=architecture.activation,
            eps=architecture.eps,
            has_class_token=False,
        )
        super().__init__(form)
        self.head = AttentionPoolingHead(sizes.width, sizes.heads, sizes.hidden, architecture)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self.head(super().forward(pixel_values))
        return embeds


class SiglipTextTransformer(nn.Module):
    """input_ids int64 (B, context length) → text_embeds float32 (B, D), not normalised.

    Every token sees every other one, padding too, and the last position is pooled, whatever stands there: the model
    was trained with rows that are filled up to the context, so that no other length is its own.
    """

    def __init__(self, architecture: SiglipArchitecture, sizes: TextSizes) -> None:
        super().__init__()
        width, eps = sizes.width, architecture.eps
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, sizes.heads, sizes.hidden, architecture.activation, eps)
            for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, architecture.embed_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token_embedding(input_ids) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        embeds: Tensor = self.head(self.norm(x[:, -1]))
        return embeds


class SiglipEncoders(nn.Module):
    """Both encoders, scale and bias, or the one encoder that there is, as one module to load weights into."""

    def __init__(self, architecture: SiglipArchitecture) -> None:
        super().__init__()
        if architecture.vision is not None:
            self.vision = SiglipVisionTransformer(architecture, architecture.vision)
        if architecture.text is not None:
            self.text = SiglipTextTransformer(architecture, architecture.text)
        if architecture.vision is not None and architecture.text is not None:
            self.logit_scale = nn.Parameter(torch.empty(()))
            self.logit_bias = nn.Parameter(torch.empty(()))


def build_encoders(architecture: SiglipArchitecture) -> SiglipEncoders:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return SiglipEncoders(architecture)
