"""SigLIP's two encoders as static-graph modules. Source: transformers 5.23, models/siglip/modeling_siglip.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.layers.text_transformer import TextForm, TextTransformer
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.siglip.architecture import NaflexSizes, SiglipArchitecture, TextSizes, VisionSizes
from vlm_export.models.siglip.naflex import NaflexVisionTransformer
from vlm_export.models.siglip.pooling import AttentionPoolingHead


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


def text_form(architecture: SiglipArchitecture, sizes: TextSizes) -> TextForm:
    """The text encoder's form.

    Every token sees every other one, padding too, and the last position is pooled, whatever stands there: the model
    was trained with rows that are filled up to the context, so that no other length is its own.
    """
    return TextForm(
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        hidden=sizes.hidden,
        context_length=sizes.context_length,
        vocab_size=sizes.vocab_size,
        output=architecture.embed_dim,
        pool="last",
        causal=False,
        projection="biased",
        activation=architecture.activation,
        eps=architecture.eps,
    )


class SiglipEncoders(nn.Module):
    """Both encoders, scale and bias, or the one encoder that there is, as one module to load weights into."""

    def __init__(self, architecture: SiglipArchitecture) -> None:
        super().__init__()
        if architecture.vision is not None:
            self.vision = _vision(architecture, architecture.vision)
        if architecture.text is not None:
            self.text = TextTransformer(text_form(architecture, architecture.text))
        if architecture.vision is not None and architecture.text is not None:
            self.logit_scale = nn.Parameter(torch.empty(()))
            self.logit_bias = nn.Parameter(torch.empty(()))


def _vision(architecture: SiglipArchitecture, sizes: VisionSizes | NaflexSizes) -> nn.Module:
    if isinstance(sizes, NaflexSizes):
        return NaflexVisionTransformer(architecture, sizes)
    return SiglipVisionTransformer(architecture, sizes)


def build_encoders(architecture: SiglipArchitecture) -> SiglipEncoders:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return SiglipEncoders(architecture)
