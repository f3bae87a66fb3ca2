"""SigLIP's sizes, from tensor shapes and from `config.json`.

Sources: transformers 5.23, models/siglip and models/siglip2 (configuration_*.py). SigLIP 2 of a fixed resolution is
published under SigLIP's `model_type`; `siglip2` is NaFlex, whose image encoder takes rows of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.layers.blocks import Activation
from vlm_export.models.reading.shapes import (
    Shapes,
    check_context,
    check_heads,
    check_implemented,
    check_stated,
    config_integer,
    config_number,
    image_size_of,
    needed_config,
)
from vlm_export.models.reading.towers import TOWERS, check_towers, section_name, stated_alike, tower_config
from vlm_export.specs.codec import Spec, between
from vlm_export.specs.patches import MAX_PATCHES

EPS = 1e-6
# By transformers' names; "gelu_pytorch_tanh" is its default for both towers.
_ACTIVATIONS: Mapping[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}


@dataclass(frozen=True)
class VisionSizes(Spec):
    """Attributes: those of config.json, and the edge of the images, a multiple of the patches but for a margin."""

    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    image_size: int
    kind: Literal["vit"] = "vit"


@dataclass(frozen=True)
class NaflexSizes(Spec):
    """Attributes: those of config.json, and the places per side of the position table."""

    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    grid: int
    kind: Literal["naflex"] = "naflex"


@dataclass(frozen=True)
class TextSizes(Spec):
    """Attributes: those of config.json; `end_token_id` and `pad_token_id` count where no tokenizer says its own."""

    width: int
    layers: int
    heads: int
    hidden: int
    context_length: int
    vocab_size: int
    end_token_id: int
    pad_token_id: int


@dataclass(frozen=True)
class SiglipArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        vision, text: the towers; one of them is None in a checkpoint of the other one alone.
        model_type: that of both towers together, whose names the single towers' types begin with.
    """

    embed_dim: int
    activation: Activation
    eps: float
    vision: VisionSizes | NaflexSizes | None
    text: TextSizes | None
    model_type: Literal["siglip", "siglip2"] = "siglip"


@dataclass(frozen=True)
class NaflexChoices(Spec):
    """Attributes: `fixed_patches`, how many patches an image has with its padding, for hosts that take no such axis."""

    fixed_patches: Annotated[int, between(1, MAX_PATCHES)] | None = None


PATCH_KEY = "vision_model.embeddings.patch_embedding.weight"


def is_naflex(checkpoint: Checkpoint) -> bool:
    """Whether it is SigLIP 2's NaFlex, by its config.json, or where there is none by the shape of its patches."""
    stated = (checkpoint.config or {}).get("model_type")
    if isinstance(stated, str):
        return stated.startswith("siglip2")
    patches = checkpoint.tensors.get(PATCH_KEY) or checkpoint.tensors.get(PATCH_KEY.removeprefix("vision_model."))
    return patches is not None and len(patches.shape) == 2


def architecture_of(checkpoint: Checkpoint) -> SiglipArchitecture:
    """Sizes from shapes; heads, activation and epsilon from `config.json`, with its defaults.

    Args:
        checkpoint: with the key names of both towers together.

    Raises:
        InputError: there is no config.json, it is malformed, or it and the tensors contradict each other.
    """
    needed_config(checkpoint, "SigLIP", "the number of heads")
    found = [tower for tower in TOWERS if any(key.startswith(f"{tower}_model.") for key in checkpoint.tensors)]
    check_towers(checkpoint, found, "SigLIP")
    shapes, configs = Shapes(checkpoint), {tower: tower_config(checkpoint, tower) for tower in TOWERS}
    vision_config, text_config = configs["vision"], configs["text"]
    naflex = is_naflex(checkpoint)
    vision = None if vision_config is None else (_naflex if naflex else _vision)(shapes, vision_config)
    text = None if text_config is None else _text(shapes, text_config)
    embed_dim = vision.width if vision is not None else shapes.of("text_model.head.weight", 2)[0]
    if text is not None and text_config is not None:
        _check_embed_dim(shapes, embed_dim)
        check_stated(checkpoint, section_name(checkpoint, "text"), text_config, {"projection_size": embed_dim})
    stated = [config for config in configs.values() if config is not None]
    activation = stated_alike(
        checkpoint, "hidden_act", [config.get("hidden_act", "gelu_pytorch_tanh") for config in stated]
    )
    if activation not in _ACTIVATIONS:
        raise InputError(
            "the activation is not one that is exported",
            where=f"{checkpoint.source}: config.json: hidden_act",
            expected=" or ".join(_ACTIVATIONS),
            got=f"{activation!r:.200}",
        )
    eps = stated_alike(
        checkpoint, "layer_norm_eps", [config_number(config, "layer_norm_eps", EPS) for config in stated]
    )
    kind = _ACTIVATIONS[cast(str, activation)]
    return SiglipArchitecture(embed_dim, kind, eps, vision, text, "siglip2" if naflex else "siglip")


def stated_vision(sizes: VisionSizes | NaflexSizes) -> dict[str, int]:
    """The sizes under config.json's names, without heads, which no tensor tells."""
    own = {"num_patches": sizes.grid**2} if isinstance(sizes, NaflexSizes) else {"image_size": sizes.image_size}
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "patch_size": sizes.patch_size,
        **own,
    }


def stated_text(sizes: TextSizes) -> dict[str, int]:
    """As `stated_vision`."""
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "max_position_embeddings": sizes.context_length,
        "vocab_size": sizes.vocab_size,
    }


def _vision(shapes: Shapes, config: Mapping[str, Any]) -> VisionSizes:
    checkpoint, section = shapes.checkpoint, section_name(shapes.checkpoint, "vision")
    check_implemented(f"{checkpoint.source}: config.json: {section}", config, {"vision_use_head": [True]})
    width, patch = shapes.patches(PATCH_KEY)
    grid = shapes.grid("vision_model.embeddings.position_embedding.weight", 2, prefix_tokens=0)
    sizes = VisionSizes(
        width=width,
        layers=shapes.count("vision_model.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 12),
        hidden=shapes.of("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=image_size_of(grid, patch, config.get("image_size")),
    )
    check_stated(checkpoint, section, config, {**stated_vision(sizes), "num_channels": 3})
    check_heads(checkpoint, "vision", width, sizes.heads)
    return sizes


def _naflex(shapes: Shapes, config: Mapping[str, Any]) -> NaflexSizes:
    checkpoint, section = shapes.checkpoint, section_name(shapes.checkpoint, "vision")
    check_implemented(f"{checkpoint.source}: config.json: {section}", config, {"vision_use_head": [True]})
    width, values = shapes.of(PATCH_KEY, 2)
    patch = math.isqrt(values // 3)
    if 3 * patch * patch != values:
        raise InputError(
            "the image encoder does not take square patches of RGB images, and nothing else is supported",
            where=f"{checkpoint.source}: tensor {PATCH_KEY}",
            expected="3 channels and a square: 768 values for patches of 16",
            got=str(values),
        )
    sizes = NaflexSizes(
        width=width,
        layers=shapes.count("vision_model.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 12),
        hidden=shapes.of("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        grid=shapes.grid("vision_model.embeddings.position_embedding.weight", 2, prefix_tokens=0),
    )
    check_stated(checkpoint, section, config, {**stated_vision(sizes), "num_channels": 3})
    check_heads(checkpoint, "vision", width, sizes.heads)
    return sizes


def _text(shapes: Shapes, config: Mapping[str, Any]) -> TextSizes:
    checkpoint = shapes.checkpoint
    vocab_size, width = shapes.of("text_model.embeddings.token_embedding.weight", 2)
    sizes = TextSizes(
        width=width,
        layers=shapes.count("text_model.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 12),
        hidden=shapes.of("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        context_length=shapes.of("text_model.embeddings.position_embedding.weight", 2)[0],
        vocab_size=vocab_size,
        end_token_id=_token(config, "eos_token_id", vocab_size),
        pad_token_id=_token(config, "pad_token_id", vocab_size),
    )
    check_stated(checkpoint, section_name(checkpoint, "text"), config, stated_text(sizes))
    check_heads(checkpoint, "text", width, sizes.heads)
    check_context(checkpoint.source, sizes.context_length)
    return sizes


def _token(config: Mapping[str, Any], key: str, vocab_size: int) -> int:
    """What config.json states, or 1 as in all published vocabularies: transformers' default, 49407, is CLIP's."""
    value = config.get(key, 1)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size else 1


def _check_embed_dim(shapes: Shapes, embed_dim: int) -> None:
    found = shapes.of("text_model.head.weight", 2)[0]
    if found != embed_dim:
        raise InputError(
            "the embeddings of images and of texts are of different widths",
            where=f"{shapes.checkpoint.source}: tensor text_model.head.weight",
            expected=f"{embed_dim} rows, the width of the image encoder",
            got=str(found),
            fix="such a checkpoint compares nothing; export each tower from a checkpoint of its own",
        )
