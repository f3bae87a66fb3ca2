"""CLIP's sizes: from tensor shapes (OpenAI), from shapes and `config.json` (Hugging Face), from `configs/`.

What shapes do not tell about weights with OpenAI's key names comes as ClipChoices; `choices.py` finds them.

Source of the rules for shapes: `build_model` in openai/CLIP model.py (d05afc4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.layers.blocks import Activation
from vlm_export.models.reading.shapes import (
    Shapes,
    check_context,
    check_heads,
    check_stated,
    check_token,
    config_integer,
    config_number,
    config_section,
    image_size_of,
    needed_config,
)
from vlm_export.models.reading.towers import check_towers, one_tower, section_name, stated_alike, tower_config
from vlm_export.specs.codec import Spec, between

KeyNames = Literal["openai", "huggingface"]
Pooling = Literal["argmax", "first_end_token"]
HEAD_WIDTH = 64
# transformers marks checkpoints older than its fix of the end-of-text id with this value; it then pools by argmax.
LEGACY_END_TOKEN_ID = 2
LAYER_NORM_EPS = 1e-5
# Endings of the `model_type` of transformers' classes of one tower and its projection (5.23, configuration_clip.py).


@dataclass(frozen=True)
class LibraryNames:
    """transformers' names for models of these weights.

    Attributes:
        model_type: of config.json, before the ending of a single tower.
        classes: what the names of its classes begin with.
        has_legacy_end: an end-of-text id of 2 stands for "pool at the highest id" instead of for the token.
    """

    model_type: str
    classes: str
    has_legacy_end: bool


CLIP_NAMES = LibraryNames("clip", "CLIP", has_legacy_end=True)


@dataclass(frozen=True)
class VitSizes(Spec):
    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    image_size: int
    kind: Literal["vit"] = "vit"


@dataclass(frozen=True)
class ResNetSizes(Spec):
    width: int
    stages: tuple[int, ...]
    heads: int
    image_size: int
    kind: Literal["resnet"] = "resnet"


@dataclass(frozen=True)
class TextSizes(Spec):
    width: int
    layers: int
    heads: int
    hidden: int
    context_length: int
    vocab_size: int
    pooling: Pooling
    end_token_id: int


@dataclass(frozen=True)
class ClipArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        vision, text: the towers; one of them is None in a checkpoint of the other one alone.
    """

    key_names: KeyNames
    embed_dim: int
    activation: Activation
    eps: float
    vision: VitSizes | ResNetSizes | None
    text: TextSizes | None

    @property
    def towers(self) -> tuple[VitSizes | ResNetSizes, TextSizes]:
        """Both, of a checkpoint that has both."""
        assert self.vision is not None
        assert self.text is not None
        return self.vision, self.text


@dataclass(frozen=True)
class ClipChoices(Spec):
    """What the shapes of weights with OpenAI's key names do not tell; the defaults are OpenAI's own.

    Attributes:
        activation: of both encoders; a ResNet has none of these.
        head_width: channels of an attention head of the image encoder.
        text_heads: attention heads of the text encoder, None: one for each 64 channels.
    """

    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    head_width: Annotated[int, between(1)] = HEAD_WIDTH
    text_heads: Annotated[int, between(1)] | None = None


OPENAI_CHOICES = ClipChoices()


def architecture_from_openai(checkpoint: Checkpoint, choices: ClipChoices = OPENAI_CHOICES) -> ClipArchitecture:
    """Sizes from OpenAI's key names and shapes; activation and heads from `choices`."""
    shapes = Shapes(checkpoint)
    is_vit = "visual.proj" in checkpoint.tensors
    vision: VitSizes | ResNetSizes = (openai_vit if is_vit else openai_resnet)(shapes, choices.head_width)
    vocab_size = shapes.of("token_embedding.weight", 2)[0]
    width = shapes.of("ln_final.weight", 1)[0]
    text = TextSizes(
        width=width,
        layers=shapes.count("transformer.resblocks."),
        heads=width // HEAD_WIDTH if choices.text_heads is None else choices.text_heads,
        hidden=shapes.of("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        context_length=shapes.of("positional_embedding", 2)[0],
        vocab_size=vocab_size,
        pooling="argmax",
        end_token_id=vocab_size - 1,
    )
    embed_dim = shapes.of("text_projection", 2)[1]
    return checked(ClipArchitecture("openai", embed_dim, choices.activation, LAYER_NORM_EPS, vision, text), checkpoint)


def openai_vit(shapes: Shapes, head_width: int) -> VitSizes:
    """Sizes of the image encoder under OpenAI's key names, with an attention head for each `head_width` channels."""
    width, patch = shapes.patches("visual.conv1.weight")
    return VitSizes(
        width=width,
        layers=shapes.count("visual.transformer.resblocks."),
        heads=_heads(width, head_width),
        hidden=shapes.of("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        patch_size=patch,
        image_size=patch * shapes.grid("visual.positional_embedding", 2),
    )


def openai_resnet(shapes: Shapes, head_width: int) -> ResNetSizes:
    """As `openai_vit`, of a ModifiedResNet."""
    width = shapes.of("visual.layer1.0.conv1.weight", 4)[0]
    return ResNetSizes(
        width=width,
        stages=tuple(shapes.count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
        heads=_heads(width * 32, head_width),
        image_size=32 * shapes.grid("visual.attnpool.positional_embedding", 2),
    )


def _heads(width: int, head_width: int) -> int:
    # Rounded down, as OpenAI and open_clip have it; no head at all is refused with the other sizes.
    return width // head_width if head_width > 0 else 0


def architecture_from_huggingface(checkpoint: Checkpoint, library: LibraryNames = CLIP_NAMES) -> ClipArchitecture:
    """Sizes from shapes; head counts, activation, epsilon and pooling from `config.json`, with its defaults.

    Raises:
        InputError: there is no config.json, it is malformed, or it and the tensors contradict each other.
    """
    config = needed_config(checkpoint, "CLIP", "the number of heads and the activation")
    projections = {"vision": "visual_projection.weight", "text": "text_projection.weight"}
    check_towers(checkpoint, [tower for tower, key in projections.items() if key in checkpoint.tensors], "CLIP")
    vision_config, text_config = clip_tower_config(checkpoint, "vision"), clip_tower_config(checkpoint, "text")
    shapes = Shapes(checkpoint)
    towers = [config for config in (vision_config, text_config) if config is not None]
    activation = activation_of(
        stated_alike(checkpoint, "hidden_act", [tower.get("hidden_act", "quick_gelu") for tower in towers])
    )
    eps = stated_alike(
        checkpoint, "layer_norm_eps", [config_number(t, "layer_norm_eps", LAYER_NORM_EPS) for t in towers]
    )
    vision = None if vision_config is None else huggingface_vision(shapes, vision_config)
    text = None if text_config is None else _huggingface_text(shapes, text_config, library)
    projection = "text_projection.weight" if vision is None else "visual_projection.weight"
    embed_dim = shapes.of(projection, 2)[0]
    check_stated(checkpoint, "", config, {"projection_dim": embed_dim})
    return checked(ClipArchitecture("huggingface", embed_dim, activation, eps, vision, text), checkpoint)


def activation_of(stated: object) -> Activation:
    """The activation that config.json states; InputError when it is not one that CLIP checkpoints use."""
    if stated not in ("quick_gelu", "gelu"):
        raise InputError(
            "the activation is not one that CLIP checkpoints use",
            where="config.json: hidden_act",
            expected="quick_gelu or gelu",
            got=f"{stated!r:.200}",
        )
    return stated


def huggingface_vision(shapes: Shapes, config: Mapping[str, Any]) -> VitSizes:
    """Sizes of the image encoder under transformers' key names, with the heads that its section of config.json states.

    Raises:
        InputError: config.json contradicts the tensors.
    """
    width, patch = shapes.patches("vision_model.embeddings.patch_embedding.weight")
    sizes = VitSizes(
        width=width,
        layers=shapes.count("vision_model.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 12),
        hidden=shapes.of("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=image_size_of(
            shapes.grid("vision_model.embeddings.position_embedding.weight", 2), patch, config.get("image_size")
        ),
    )
    stated = {**stated_vision(sizes), "num_channels": 3}
    check_stated(shapes.checkpoint, section_name(shapes.checkpoint, "vision"), config, stated)
    return sizes


def _huggingface_text(shapes: Shapes, config: Mapping[str, Any], library: LibraryNames) -> TextSizes:
    section = section_name(shapes.checkpoint, "text")
    in_section = f"{section}: " if section else ""
    if isinstance(config.get("eos_token_id"), list):
        raise InputError(
            "CLIP pools at one end-of-text token, and its config has a list of them",
            where=f"{shapes.checkpoint.source}: config.json: {in_section}eos_token_id",
            expected="one token id",
            got=f"{config['eos_token_id']!r:.100}",
            fix="transformers fails on a list too: write the id that the tokenizer puts behind texts",
        )
    end_token_id = config_integer(config, "eos_token_id", 49407)
    vocab_size, text_width = shapes.of("text_model.embeddings.token_embedding.weight", 2)
    legacy = library.has_legacy_end and end_token_id == LEGACY_END_TOKEN_ID
    sizes = TextSizes(
        width=text_width,
        layers=shapes.count("text_model.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 8),
        hidden=shapes.of("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        context_length=shapes.of("text_model.embeddings.position_embedding.weight", 2)[0],
        vocab_size=vocab_size,
        pooling="argmax" if legacy else "first_end_token",
        end_token_id=vocab_size - 1 if legacy else end_token_id,
    )
    check_token(shapes.checkpoint, f"{in_section}eos_token_id", sizes.end_token_id, vocab_size)
    check_stated(shapes.checkpoint, section, config, stated_text(sizes))
    return sizes


def clip_tower_config(checkpoint: Checkpoint, tower: str) -> Mapping[str, Any] | None:
    """`tower_config`; where old files have `text_config_dict`, transformers reads nothing else of them."""
    old = f"{tower}_config_dict"
    if one_tower(checkpoint) is None and (checkpoint.config or {}).get(old) is not None:
        return config_section(checkpoint, old)
    return tower_config(checkpoint, tower)


def stated_in(checkpoint: Checkpoint, tower: str, key: str) -> str:
    """Which place states a field of a tower, for people."""
    old = f"{tower}_config_dict"
    section = old if (checkpoint.config or {}).get(old) is not None else f"{tower}_config"
    place = key if one_tower(checkpoint) else f"{section}.{key}"
    has_it = key in (clip_tower_config(checkpoint, tower) or {})
    return f"config.json: {place}" if has_it else f"default of CLIP{tower.capitalize()}Config"


def stated_vision(sizes: VitSizes) -> dict[str, int]:
    """The sizes under config.json's names, without heads, which no tensor tells."""
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
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


def checked(architecture: ClipArchitecture, checkpoint: Checkpoint) -> ClipArchitecture:
    """The architecture; InputError when its sizes do not fit together."""
    for name, sizes in (("vision", architecture.vision), ("text", architecture.text)):
        if sizes is None:
            continue
        width = sizes.width * 32 if isinstance(sizes, ResNetSizes) else sizes.width
        check_heads(checkpoint, name, width, sizes.heads)
    if architecture.text is not None:
        check_context(checkpoint.source, architecture.text.context_length)
    return architecture
