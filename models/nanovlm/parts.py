"""nanoVLM's Parts: what a host runs once for an image, for a prompt, and at every step; Signatures and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor, nn

from vlm_export.family import Array, Part
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.layers.rotary_decoder import (
    CachedDecoder,
    EmbedTokens,
    LanguageModel,
    RotaryDecoderSizes,
    cache_names,
)
from vlm_export.models.layers.vit import VisionTransformer
from vlm_export.models.nanovlm.architecture import NanoVlmArchitecture
from vlm_export.models.reading.token_ids import random_ids
from vlm_export.specs.signature import Axis, Signature, TensorSpec

BATCH = Axis("batch")


class NanoVlmModules(nn.Module):
    """All weights of a checkpoint, as one module to load into."""

    def __init__(self, architecture: NanoVlmArchitecture) -> None:
        super().__init__()
        vision, decoder = architecture.vision, architecture.decoder
        self.vision = VisionTransformer(vision)
        self.projection = nn.Linear(vision.width * architecture.pixel_shuffle**2, decoder.width, bias=False)
        self.decoder = LanguageModel(decoder)


class VisionEncoder(nn.Module):
    """pixel_values float32 (B, 3, S, S) in [0, 1] → image_features float32 (B, L, width of the language model).

    Port of `ViT` and `ModalityProjector` (huggingface/nanoVLM 4e0c096): squares of patches become one feature each,
    their channels in the order row, column, channel.
    """

    def __init__(self, modules: NanoVlmModules, factor: int) -> None:
        super().__init__()
        self.vision, self.projection, self.factor = modules.vision, modules.projection, factor

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.projection(shuffled(self.vision(pixel_values), self.vision.form.grid, self.factor))
        return features


def shuffled(tokens: Tensor, grid: int, factor: int) -> Tensor:
    """(B, grid², C) → (B, (grid / factor)², factor² · C)."""
    channels, side = tokens.shape[2], grid // factor
    squares = tokens.reshape(-1, side, factor, side, factor, channels).transpose(2, 3)
    return squares.reshape(-1, side * side, factor * factor * channels)


def build_modules(architecture: NanoVlmArchitecture) -> NanoVlmModules:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return NanoVlmModules(architecture)


def build_parts(architecture: NanoVlmArchitecture, modules: NanoVlmModules) -> Iterator[Part]:
    """`vision_encoder`, `embed_tokens` and `decoder`, in the order in which a host runs them."""
    sizes = architecture.decoder
    vision = VisionEncoder(modules, architecture.pixel_shuffle)
    signature = _vision_signature(architecture)
    yield Part("vision_encoder", vision.eval(), signature, ChatExamples(signature))
    signature = _embedding_signature(sizes)
    yield Part(
        "embed_tokens", EmbedTokens(modules.decoder).eval(), signature, ChatExamples(signature, sizes.vocab_size)
    )
    signature = _decoder_signature(sizes)
    yield Part("decoder", CachedDecoder(modules.decoder).eval(), signature, ChatExamples(signature))


def _vision_signature(architecture: NanoVlmArchitecture) -> Signature:
    size, width = architecture.image_size, architecture.decoder.width
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, size, size))
    features = TensorSpec("image_features", "float32", ("batch", architecture.tokens_per_tile, width))
    return Signature((pixels,), (features,), (BATCH,))


def _embedding_signature(sizes: RotaryDecoderSizes) -> Signature:
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    embeds = TensorSpec("inputs_embeds", "float32", ("batch", "sequence", sizes.width))
    return Signature((ids,), (embeds,), (BATCH, Axis("sequence", 1, sizes.positions)))


def _decoder_signature(sizes: RotaryDecoderSizes) -> Signature:
    total = Axis("total_sequence", 1, sizes.positions, sum_of=("past_sequence", "sequence"))
    return Signature(
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "sequence", sizes.width)),
            TensorSpec("attention_mask", "int64", ("batch", total.name)),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            TensorSpec("num_logits_to_keep", "int64", ()),
            *_cache(sizes, "past_key_values", "past_sequence"),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "logits_sequence", sizes.vocab_size)),
            *_cache(sizes, "present", total.name),
        ),
        axes=(
            BATCH,
            Axis("sequence", 1, sizes.positions),
            Axis("past_sequence", 0, sizes.positions),
            total,
            Axis("logits_sequence", 1, sizes.positions, at_most="sequence"),
        ),
    )


def _cache(sizes: RotaryDecoderSizes, prefix: str, axis: str) -> tuple[TensorSpec, ...]:
    shape = ("batch", sizes.kv_heads, axis, sizes.head_width)
    return tuple(TensorSpec(name, "float32", shape) for name in cache_names(sizes.layers, prefix))


class ChatExamples:
    """Pixels in [0, 1], random ids, normal noise for other floats; each row padded on its left by a length of its own.

    Position ids count from a row's first real token, as hosts count them.
    """

    def __init__(self, signature: Signature, vocab_size: int = 0) -> None:
        self.signature, self.vocab_size = signature, vocab_size

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        arrays = {spec.name: self._array(spec, sizes, rng) for spec in self.signature.inputs}
        if "position_ids" in arrays:
            counted = np.maximum(arrays["attention_mask"].cumsum(axis=1) - 1, 0)
            arrays["position_ids"] = np.ascontiguousarray(counted[:, -sizes["sequence"] :])
        if "num_logits_to_keep" in arrays:
            kept = sizes["logits_sequence"]
            # All of them are asked for as hosts do that count none.
            arrays["num_logits_to_keep"] = np.array(0 if kept == sizes["sequence"] else kept, np.int64)
        return arrays

    def _array(self, spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
        shape = spec.concrete_shape(sizes)
        if spec.name == "pixel_values":
            return rng.random(shape, dtype=np.float32)
        if spec.dtype == "float32":
            return rng.standard_normal(shape, dtype=np.float32)
        if spec.name == "attention_mask":
            padding = rng.integers(0, shape[1], (shape[0], 1))
            return (np.arange(shape[1]) >= padding).astype(np.int64)
        if spec.name == "input_ids":
            return random_ids(rng, shape, self.vocab_size)
        return np.zeros(shape, np.int64)  # what follows from the others
