"""CLIP's two encoders as static-graph modules; sources as in `clip.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_export.models.clip.architecture import ClipArchitecture, TextSizes, VitSizes
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.layers.modified_resnet import ModifiedResNet
from vlm_export.models.layers.text_transformer import TextForm, TextTransformer
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


def text_form(architecture: ClipArchitecture, sizes: TextSizes) -> TextForm:
    """The text encoder's form."""
    return TextForm(
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        hidden=sizes.hidden,
        context_length=sizes.context_length,
        vocab_size=sizes.vocab_size,
        output=architecture.embed_dim,
        pool="highest_id" if sizes.pooling == "argmax" else "end_token",
        end_token_id=sizes.end_token_id,
        activation=architecture.activation,
        eps=architecture.eps,
    )


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
            self.text = TextTransformer(text_form(architecture, text))
        if vision is not None and text is not None:
            self.logit_scale = nn.Parameter(torch.empty(()))


def build_encoders(architecture: ClipArchitecture) -> ClipEncoders:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return ClipEncoders(architecture)
