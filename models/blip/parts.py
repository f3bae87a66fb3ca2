"""BLIP's Parts: modules over the shared weights, with their Signatures and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.family import Part
from vlm_export.models.blip.architecture import BlipArchitecture
from vlm_export.models.blip.nlvr import PairOfImagesText
from vlm_export.models.layers.bert import (
    Bert,
    BertHead,
    BertSizes,
    CrossKeyValues,
    MultimodalEncoder,
    TextDecoder,
    TextEncoder,
    cache_names,
)
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.reading.images import ImageExamples, image_shape
from vlm_export.models.reading.token_ids import ArrayExamples
from vlm_export.specs.signature import Axis, Signature, TensorSpec

BATCH = Axis("batch")
ENCODER_SEQUENCE = "encoder_sequence"


class BlipModules(nn.Module):
    """All weights of a checkpoint, as one module to load into."""

    def __init__(self, architecture: BlipArchitecture) -> None:
        super().__init__()
        vision, encoder, decoder = architecture.vision, architecture.encoder, architecture.decoder
        self.vision = VisionTransformer(
            VitForm(
                width=vision.width,
                layers=vision.layers,
                heads=vision.heads,
                hidden=vision.hidden,
                patch_size=vision.patch_size,
                grid=vision.image_size // vision.patch_size,
                eps=vision.eps,
            )
        )
        if encoder is not None and architecture.compares_images:
            self.pair = PairOfImagesText(encoder)
        elif encoder is not None:
            self.encoder = Bert(encoder)
            if architecture.projection_dim:
                self.vision_projection = nn.Linear(vision.width, architecture.projection_dim)
                self.text_projection = nn.Linear(encoder.width, architecture.projection_dim)
            if architecture.has_matching_head:
                self.matching = nn.Linear(encoder.width, 2)
        if decoder is not None:
            self.decoder, self.decoder_head = Bert(decoder), BertHead(decoder)


class VisionPart(nn.Module):
    """pixel_values float32 (B, 3, S, S) → [image_embeds (B, D) of unit length,] last_hidden_state (B, N, width)."""

    def __init__(self, vision: VisionTransformer, projection: nn.Module | None) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return _with_embeds(self.vision(pixel_values), self.projection)


class TextPart(nn.Module):
    """Text alone → [text_embeds (B, D) of unit length,] last_hidden_state (B, T, width)."""

    def __init__(self, bert: Bert, projection: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.projection = TextEncoder(bert), projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return _with_embeds(self.encoder(input_ids, attention_mask), self.projection)


class MultimodalPart(nn.Module):
    """Text that attends to an image → [itm_logits (B, 2), 1 is a match,] last_hidden_state (B, T, width)."""

    def __init__(self, bert: Bert, matching: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.matching = MultimodalEncoder(bert), matching

    def forward(self, input_ids: Tensor, attention_mask: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encoder(input_ids, attention_mask, encoder_hidden_states)
        return (hidden,) if self.matching is None else (self.matching(hidden[:, 0]), hidden)


def _with_embeds(hidden: Tensor, projection: nn.Module | None) -> tuple[Tensor, ...]:
    return (hidden,) if projection is None else (F.normalize(projection(hidden[:, 0]), dim=-1), hidden)


def build_modules(architecture: BlipArchitecture) -> BlipModules:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return BlipModules(architecture)


def build_parts(architecture: BlipArchitecture, modules: BlipModules) -> Iterator[Part]:
    """The Parts that the checkpoint has weights for, in the order in which a host runs them."""
    has_projection, encoder, decoder = bool(architecture.projection_dim), architecture.encoder, architecture.decoder
    vision = VisionPart(modules.vision, modules.vision_projection if has_projection else None)
    signature = _vision_signature(architecture)
    yield Part("vision", vision.eval(), signature, ImageExamples(signature))
    if encoder is not None:
        yield from _encoder_parts(architecture, encoder, modules)
    if decoder is not None:
        keys_values, module = CrossKeyValues(modules.decoder), TextDecoder(modules.decoder, modules.decoder_head)
        states_tokens = encoder.positions if architecture.answers_questions and encoder else architecture.image_tokens
        states = Axis(ENCODER_SEQUENCE, 1, states_tokens)
        signature = _keys_values_signature(decoder, states)
        yield Part("cross_key_values", keys_values.eval(), signature, ArrayExamples(signature))
        signature = _decoder_signature(decoder, states)
        yield Part("text_decoder", module.eval(), signature, ArrayExamples(signature, decoder.vocab_size))


def _encoder_parts(architecture: BlipArchitecture, sizes: BertSizes, modules: BlipModules) -> Iterator[Part]:
    states = Axis(ENCODER_SEQUENCE, 1, architecture.image_tokens)
    if architecture.compares_images:
        signature = _pair_signature(sizes, states)
        yield Part("pair_text", modules.pair.eval(), signature, ArrayExamples(signature, sizes.vocab_size))
        return
    if architecture.answers_questions:
        signature = _multimodal_signature(sizes, states, has_matching_head=False)
        module: nn.Module = MultimodalEncoder(modules.encoder)
        yield Part("vqa_encoder", module.eval(), signature, ArrayExamples(signature, sizes.vocab_size))
        return
    signature = _text_signature(sizes, architecture.projection_dim)
    module = TextPart(modules.encoder, modules.text_projection if architecture.projection_dim else None)
    yield Part("text", module.eval(), signature, ArrayExamples(signature, sizes.vocab_size))
    if sizes.states_width:
        signature = _multimodal_signature(sizes, states, has_matching_head=architecture.has_matching_head)
        module = MultimodalPart(modules.encoder, modules.matching if architecture.has_matching_head else None)
        yield Part("multimodal_text", module.eval(), signature, ArrayExamples(signature, sizes.vocab_size))


def _ids(name: str, axis: str) -> TensorSpec:
    return TensorSpec(name, "int64", ("batch", axis))


def _hidden(sizes: BertSizes) -> TensorSpec:
    return TensorSpec("last_hidden_state", "float32", ("batch", "sequence", sizes.width))


def _embeds(name: str, projection_dim: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name, "float32", ("batch", projection_dim)),) if projection_dim else ()


def _vision_signature(architecture: BlipArchitecture) -> Signature:
    vision = architecture.vision
    shape, axes = image_shape(vision.image_size, vision.patch_size, dynamic_image_size=False)
    tokens = TensorSpec("last_hidden_state", "float32", ("batch", architecture.image_tokens, vision.width))
    return Signature(
        inputs=(TensorSpec("pixel_values", "float32", shape),),
        outputs=(*_embeds("image_embeds", architecture.projection_dim), tokens),
        axes=(BATCH, *axes),
    )


def _text_signature(sizes: BertSizes, projection_dim: int) -> Signature:
    return Signature(
        inputs=(_ids("input_ids", "sequence"), _ids("attention_mask", "sequence")),
        outputs=(*_embeds("text_embeds", projection_dim), _hidden(sizes)),
        axes=(BATCH, Axis("sequence", 1, sizes.positions)),
    )


def _multimodal_signature(sizes: BertSizes, states: Axis, *, has_matching_head: bool) -> Signature:
    logits = (TensorSpec("itm_logits", "float32", ("batch", 2)),) if has_matching_head else ()
    hidden_states = TensorSpec("encoder_hidden_states", "float32", ("batch", states.name, sizes.states_width))
    return Signature(
        inputs=(_ids("input_ids", "sequence"), _ids("attention_mask", "sequence"), hidden_states),
        outputs=(*logits, _hidden(sizes)),
        axes=(BATCH, Axis("sequence", 1, sizes.positions), states),
    )


def _pair_signature(sizes: BertSizes, states: Axis) -> Signature:
    images = tuple(
        TensorSpec(f"encoder_hidden_states_{i}", "float32", ("batch", states.name, sizes.states_width)) for i in (0, 1)
    )
    return Signature(
        inputs=(_ids("input_ids", "sequence"), _ids("attention_mask", "sequence"), *images),
        outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
        axes=(BATCH, Axis("sequence", 1, sizes.positions), states),
    )


def _cache(sizes: BertSizes, prefix: str, axes: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """Keys and values of each layer; `axes`: kind ("decoder", "encoder") → name of the sequence axis."""
    head_width = sizes.width // sizes.heads
    return tuple(
        TensorSpec(name, "float32", ("batch", sizes.heads, axes[name.split(".")[-2]], head_width))
        for name in cache_names(sizes.layers, tuple(axes), prefix)
    )


def _keys_values_signature(sizes: BertSizes, states: Axis) -> Signature:
    hidden_states = TensorSpec("encoder_hidden_states", "float32", ("batch", states.name, sizes.states_width))
    return Signature((hidden_states,), _cache(sizes, "present", {"encoder": states.name}), (BATCH, states))


def _decoder_signature(sizes: BertSizes, states: Axis) -> Signature:
    past = _cache(sizes, "past_key_values", {"decoder": "past_sequence", "encoder": states.name})
    total = Axis("total_sequence", 1, sizes.positions, sum_of=("past_sequence", "sequence"))
    return Signature(
        inputs=(
            _ids("input_ids", "sequence"),
            _ids("attention_mask", total.name),
            _ids("encoder_attention_mask", states.name),
            *past,
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "sequence", sizes.vocab_size)),
            *_cache(sizes, "present", {"decoder": total.name}),
        ),
        axes=(
            BATCH,
            Axis("sequence", 1, sizes.positions),
            Axis("past_sequence", 0, sizes.positions),
            states,
            total,
        ),
    )
