"""Sizes of the vision modules of MiniCPM-V and OmniLMM: from shapes, and from `config.json` what shapes cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions, Checkpoint
from vlm_export.models.layers.navit import EPS, NavitSizes
from vlm_export.models.layers.resampler import ResamplerSizes
from vlm_export.models.layers.vit import VitForm
from vlm_export.models.reading.shapes import (
    Shapes,
    check_heads,
    check_implemented,
    check_stated,
    config_integer,
    config_section,
)
from vlm_export.specs.codec import Spec, between

Version = Literal["1.0", "2.0", "2.5", "2.6", "4.0", "4.5", "omnilmm"]
# Packed versions by the number in config.json; 2.6 is what later ones without their own rules follow.
_PACKED: dict[float, Version] = {2.5: "2.5", 2.6: "2.6", 4.0: "4.0", 4.5: "4.5"}
# Widths of a head in the published files: timm's so400m, EVA-02 enormous and the resampler do not state it.
_SIGLIP_HEAD, _RESAMPLER_HEAD = 72, 128
# timm's eva02_enormous_patch14_clip_224 (timm 1.0, models/eva.py), the one encoder that OmniLMM was published with.
_EVA_WIDTH, _EVA_HEADS = 1792, 16
_DEFAULT_SIZE = 448
# What is assumed of encoders of another width.
_OTHER_EVA_HEAD = 32


@dataclass(frozen=True)
class VisionArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        vision: of timm's encoders (1.0, 2.0, OmniLMM), or of SigLIP-NaViT (2.5 and later).
        image_size: edge in pixels of the square that 1.0 and OmniLMM take; else of a slice's area.
    """

    version: Version
    vision: VitForm | NavitSizes
    resampler: ResamplerSizes
    image_size: int

    def check(self) -> None:
        if self.is_packed != (self.version in _PACKED.values()):
            raise self.refusal("vision", f"the sizes of the vision transformer of version {self.version}")

    @property
    def is_packed(self) -> bool:
        return isinstance(self.vision, NavitSizes)


def minicpmv_architecture(checkpoint: Checkpoint) -> VisionArchitecture:
    """Of a MiniCPM-V directory; the depth is what the file holds, since 2.0 was saved without its last layer."""
    shapes, config = Shapes(checkpoint), checkpoint.config
    if config is None:
        raise InputError(
            "a MiniCPM-V checkpoint needs its config.json",
            where=checkpoint.source,
            expected="config.json beside the weights: it says the version",
            got="no config.json",
            fix="put the model's config.json beside the weights file; the code that made both saves them together",
        )
    packed = "vpm.pos_embed" not in checkpoint.tensors
    version = _version(config) if packed else ("2.0" if "slice_mode" in config else "1.0")
    vision: VitForm | NavitSizes = _navit(shapes, version) if packed else _siglip(shapes)
    resampler = _resampler(shapes, "resampler.", stored=version == "1.0")
    section, _, size_key = stated_slicing(version, checkpoint)
    image_size = config_integer(section, size_key, _DEFAULT_SIZE)
    return _checked(VisionArchitecture(version, vision, resampler, image_size), checkpoint)


def stated_slicing(version: Version, checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str, str]:
    """The object of config.json that says how images are cut, what its keys begin with, and the key of their size."""
    if version in ("1.0", "2.0", "omnilmm"):
        return checkpoint.config or {}, "", "scale_resolution" if version == "2.0" else "image_size"
    return config_section(checkpoint, "slice_config"), "slice_config.", "scale_resolution"


def omnilmm_architecture(checkpoint: Checkpoint, head_width: int | None = None) -> VisionArchitecture:
    """Of an OmniLMM directory; `head_width` of the image encoder's attention, where the user says it.

    Raises:
        UsageError: the width is no multiple of `head_width`, or is the published one, whose heads are known.
    """
    shapes = Shapes(checkpoint)
    prefix = "model.vision_tower."
    width, patch = shapes.patches(f"{prefix}patch_embed.proj.weight")
    vision = VitForm(
        width=width,
        layers=shapes.count(f"{prefix}blocks."),
        heads=_eva_heads(checkpoint, width, head_width),
        hidden=shapes.of(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        grid=shapes.grid(f"{prefix}pos_embed", 3),
        post_norm=True,
        antialias=True,
    )
    section, _, size_key = stated_slicing("omnilmm", checkpoint)
    image_size = config_integer(section, size_key, _DEFAULT_SIZE)
    resampler = _resampler(shapes, "model.resampler.", stored=True)
    return _checked(VisionArchitecture("omnilmm", vision, resampler, image_size), checkpoint)


@dataclass(frozen=True)
class HeadWidth(Spec):
    """What the weights of another image encoder than the published one do not say.

    Attributes:
        head_width: channels of an attention head of the image encoder; None where nobody tells.
    """

    head_width: Annotated[int, between(1)] | None = None


def assumed_heads(checkpoint: Checkpoint, options: BuildOptions) -> tuple[str, ...]:
    """A warning where the heads of OmniLMM's image encoder are neither known nor told."""
    head_width = HeadWidth.from_config(options.family_options).head_width
    vision = omnilmm_architecture(checkpoint, head_width).vision
    if vision.width == _EVA_WIDTH or head_width is not None:
        return ()
    return (
        f"neither the weights nor config.json say how many attention heads an image encoder of width {vision.width} "
        f"has: {vision.heads} heads, {vision.width // vision.heads} wide, are assumed (else --set head_width=N); with "
        "a wrong number all features are wrong, and verification cannot see it",
    )


def _eva_heads(checkpoint: Checkpoint, width: int, head_width: int | None) -> int:
    if head_width is None:
        return _EVA_HEADS if width == _EVA_WIDTH else max(width // _OTHER_EVA_HEAD, 1)
    if width == _EVA_WIDTH:
        raise UsageError(
            "the heads of the published image encoder are known",
            where=checkpoint.source,
            expected=f"{_EVA_HEADS} heads of {_EVA_WIDTH // _EVA_HEADS} channels",
            got=f"head_width={head_width}",
            fix="leave --set head_width out",
        )
    if width % head_width:
        raise UsageError(
            "the image encoder's width is not a multiple of head_width",
            where=checkpoint.source,
            expected=f"a divisor of {width}",
            got=str(head_width),
        )
    return width // head_width


def _version(config: Mapping[str, Any]) -> Version:
    stated = config.get("version", 2.6)
    try:
        return _PACKED[round(float(stated), 1)]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            "the version of MiniCPM-V is not known",
            where="config.json: version",
            expected=", ".join(str(version) for version in _PACKED),
            got=f"{stated!r:.200}",
        ) from None


def _siglip(shapes: Shapes) -> VitForm:
    width, patch = shapes.patches("vpm.patch_embed.proj.weight")
    return VitForm(
        width=width,
        layers=shapes.count("vpm.blocks."),
        heads=max(width // _SIGLIP_HEAD, 1),
        hidden=shapes.of("vpm.blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        grid=shapes.grid("vpm.pos_embed", 3, prefix_tokens=0),
        has_class_token=False,
        antialias=True,
    )


def _navit(shapes: Shapes, version: Version) -> NavitSizes:
    width, patch = shapes.patches("vpm.embeddings.patch_embedding.weight")
    config = config_section(shapes.checkpoint, "vision_config")
    sizes = NavitSizes(
        width=width,
        layers=shapes.count("vpm.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 16),
        hidden=shapes.of("vpm.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        grid=shapes.grid("vpm.embeddings.position_embedding.weight", 2, prefix_tokens=0),
        positions="row" if version == "2.5" else "grid",
    )
    implemented = {"hidden_act": ("gelu_pytorch_tanh",), "layer_norm_eps": (EPS,)}
    check_implemented(f"{shapes.checkpoint.source}: config.json: vision_config", config, implemented)
    stated = {"hidden_size": width, "intermediate_size": sizes.hidden, "patch_size": patch}
    stated["image_size"] = sizes.grid * patch
    if (drops := _drops_last_layer(shapes.checkpoint)) is not None:
        # The original builds one layer less, and saves none for it.
        stated["num_hidden_layers"] = sizes.layers + drops
    check_stated(shapes.checkpoint, "vision_config", config, stated)
    return sizes


def _drops_last_layer(checkpoint: Checkpoint) -> bool | None:
    """Whether the original leaves its encoder's last layer out; None where config.json leaves it to the code."""
    stated = (checkpoint.config or {}).get("drop_vision_last_layer")
    if stated is not None and not isinstance(stated, bool):
        raise InputError(
            "config.json is malformed",
            where="config.json: drop_vision_last_layer",
            expected="true or false",
            got=f"{stated!r:.200}",
        )
    return stated


def _resampler(shapes: Shapes, prefix: str, *, stored: bool) -> ResamplerSizes:
    queries, width = shapes.of(f"{prefix}query", 2)
    projection = f"{prefix}kv_proj.weight"
    has = shapes.checkpoint.tensors.__contains__
    return ResamplerSizes(
        queries=queries,
        width=width,
        heads=max(width // _RESAMPLER_HEAD, 1),
        states_width=shapes.of(projection, 2)[1] if has(projection) else width,
        positions="stored" if stored else "grid",
        query_positions=has(f"{prefix}pos_embed"),
    )


def _checked(architecture: VisionArchitecture, checkpoint: Checkpoint) -> VisionArchitecture:
    check_heads(checkpoint, "vision", architecture.vision.width, architecture.vision.heads)
    check_heads(checkpoint, "resampler", architecture.resampler.width, architecture.resampler.heads)
    return architecture
