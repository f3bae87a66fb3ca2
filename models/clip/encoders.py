"""CLIP's two encoders as static-graph modules; sources as in `clip.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_export.models.clip.architecture import ClipArchitecture, TextSizes, VitSizes
from vlm_export.models.layers.blocks import TransformerBlock, build_causal_mask, meta_modules
from vlm_export.models.layers.modified_resnet import ModifiedResNet
from vlm_export.models.layers.vit import VisionTransformer, VitForm


class ClipVisionTransformer(VisionTransformer):
    """pixel_values float32 (B, 3, S, S), normalised → image_embeds float32 (B, D), not normalised."""

    def __init__(self, architecture: ClipArchitecture, sizes: VitSizes) -> None:
        form = VitForm(
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            hidden=sizes.hidden,
            patch_size=sizes.patch_size,
            grid=sizes.image_size // sizes.patch_size,
            activation=architecture.activation,
            eps=architecture.eps,
            patch_bias=False,
            norm_first=True,
        )
        super().__init__(form)
        self.projection = nn.Parameter(torch.empty(sizes.width, architecture.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self.norm_post(self.encode(pixel_values)[:, 0]) @ self.projection
        return embeds


class TextTransformer(nn.Module):
    """input_ids int64 (B, T), 1 ≤ T ≤ context length → text_embeds float32 (B, D), not normalised.

    Causal, so tokens after end-of-text cannot change the row: a batch needs only its longest row's T.
    """

    causal_mask: Tensor

    def __init__(self, architecture: ClipArchitecture, sizes: TextSizes) -> None:
        super().__init__()
        width, eps = sizes.width, architecture.eps
        self.width = width
        self.end_token_id = sizes.end_token_id if sizes.pooling == "first_end_token" else None
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.register_buffer("causal_mask", build_causal_mask(sizes.context_length), persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, sizes.heads, sizes.hidden, architecture.activation, eps)
            for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.projection = nn.Parameter(torch.empty(width, architecture.embed_dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.position_embedding[:tokens]
        mask = self.causal_mask[:tokens, :tokens]
        for block in self.blocks:
            x = block(x, mask)
        # The norm acts on each token alone, so pooling first gives the same row for a T-th of the work.
        end = self._end_positions(input_ids).reshape(-1, 1, 1).expand(-1, 1, self.width)
        pooled = x.gather(1, end).reshape(-1, self.width)
        embeds: Tensor = self.norm(pooled) @ self.projection
        return embeds

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        if self.end_token_id is None:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.end_token_id).to(torch.int32).argmax(dim=-1)


class ClipEncoders(nn.Module):
    """Both encoders and the logit scale, or the one encoder that there is, as one module to load weights into."""

    vision: nn.Module

    def __init__(self, architecture: ClipArchitecture) -> None:
        super().__init__()
        vision, embed_dim = architecture.vision, architecture.embed_dim
        if isinstance(vision, VitSizes):
            self.vision = ClipVisionTransformer(architecture, vision)
        elif vision is not None:
            self.vision = ModifiedResNet(vision.stages, vision.width, vision.image_size, vision.heads, embed_dim)
        text = architecture.text
        if text is not None:
            self.text = TextTransformer(architecture, text)
        if vision is not None and text is not None:
            self.logit_scale = nn.Parameter(torch.empty(()))


def build_encoders(architecture: ClipArchitecture) -> ClipEncoders:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return ClipEncoders(architecture)
