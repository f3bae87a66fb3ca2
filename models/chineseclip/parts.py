"""Chinese-CLIP's Parts: CLIP's image encoder, and BERT read at its first token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlm_export.family import Part
from vlm_export.models.chineseclip.architecture import ChineseClipArchitecture
from vlm_export.models.clip.encoders import ClipEncoders
from vlm_export.models.clip.family import vision_signature
from vlm_export.models.layers.bert import Bert, TextEncoder
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.reading.images import ImageExamples
from vlm_export.models.reading.token_ids import ArrayExamples
from vlm_export.specs.signature import Axis, Signature, TensorSpec


class BertText(nn.Module):
    """input_ids, attention_mask int64 (B, T) → text_embeds float32 (B, D), not normalised: the first token's state."""

    def __init__(self, architecture: ChineseClipArchitecture) -> None:
        super().__init__()
        sizes, width = architecture.text, architecture.text.width
        self.encoder = TextEncoder(Bert(sizes, architecture.token_types, architecture.padding_id))
        self.has_mapping = architecture.mapping is not None
        if architecture.mapping is not None:
            self.norm = nn.LayerNorm(width, eps=sizes.eps)
            self.mapping = nn.Linear(width, architecture.mapping)
            width = architecture.mapping
        self.projection = nn.Parameter(torch.empty(width, architecture.embed_dim))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        state: Tensor = self.encoder(input_ids, attention_mask)[:, 0]
        if self.has_mapping:
            state = self.mapping(self.norm(state))
        return state @ self.projection


class ChineseClipEncoders(nn.Module):
    """Both encoders and the logit scale, as one module to load weights into."""

    def __init__(self, architecture: ChineseClipArchitecture) -> None:
        super().__init__()
        self.vision = ClipEncoders(architecture.image_encoder).vision
        self.text = BertText(architecture)
        self.logit_scale = nn.Parameter(torch.empty(()))


def build_encoders(architecture: ChineseClipArchitecture) -> ChineseClipEncoders:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return ChineseClipEncoders(architecture)


def build_parts(
    architecture: ChineseClipArchitecture, encoders: ChineseClipEncoders, *, dynamic_image_size: bool = False
) -> Iterator[Part]:
    """Both encoders, in the order in which they are exported."""
    vision = vision_signature(architecture.image_encoder, architecture.vision, dynamic_image_size)
    yield Part("vision", encoders.vision, vision, ImageExamples(vision))
    text = Signature(
        inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(Axis("batch"), Axis("sequence", 1, architecture.longest_text)),
    )
    yield Part("text", encoders.text, text, ArrayExamples(text, architecture.text.vocab_size))
