"""What shapes do not tell about CLIP weights with OpenAI's key names: the activation and the attention heads.

OpenAI's own archives are known. open_clip saves other models under the same names, and describes them in
`open_clip_config.json`; of its fields only those are accepted whose model this project computes. Otherwise the user
says it, or OpenAI's choices are assumed, with a warning.

Source of the fields, their defaults and their meaning: open_clip 3.3.0 (model.py, transformer.py, factory.py,
transform.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from vlm_export.errors import InputError, UsageError
from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint
from vlm_export.models.clip.architecture import (
    HEAD_WIDTH,
    OPENAI_CHOICES,
    ClipArchitecture,
    ClipChoices,
    VitSizes,
    architecture_from_openai,
)
from vlm_export.models.reading.image_processor import Prepared, processor_files, same_origin
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD, Channels
from vlm_export.models.reading.shapes import config_integer, config_number, image_size_of
from vlm_export.specs import Origins, Resample, torchvision_image_spec

FILE = "open_clip_config.json"
TEXT_MARK = "text.token_embedding.weight"
# OpenAI's archives, and state dicts taken out of them, carry the image size as a tensor; open_clip's never do.
_OPENAI_MARK = "input_resolution"
_ABSENT = (None, "")
_PLAIN_BLOCKS: Mapping[str, tuple[Any, ...]] = {
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
    "ls_init_value": (None,),
    "output_tokens": (False,),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}
# Field → the values whose model is computed here; they begin with the default. Empty: sizes, what training alone
# needs, and what other fields switch off.
_MODEL: Mapping[str, tuple[Any, ...]] = {
    "embed_dim": (),
    "vision_cfg": (),
    "text_cfg": (),
    "quick_gelu": (False, True),
    "custom_text": (),
    "init_logit_scale": (),
    "init_logit_bias": (None,),
    "nonscalar_logit_scale": (False, True),
    "output_dict": (),
}
_VISION: Mapping[str, tuple[Any, ...]] = {
    **_PLAIN_BLOCKS,
    **dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"), ()),
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads", "n_queries"), ()),
    "timm_model_name": _ABSENT,
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    # Both are saved as weights; what they begin with differs.
    "pos_embed_type": ("learnable", "sin_cos_2d"),
    "pool_type": ("tok",),
    "final_ln_after_pool": (False, True),
    # Of earlier versions.
    "global_average_pool": (False,),
    "input_patchnorm": (False,),
}
_TEXT: Mapping[str, tuple[Any, ...]] = {
    **_PLAIN_BLOCKS,
    **dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"), ()),
    "hf_model_name": _ABSENT,
    "hf_tokenizer_name": _ABSENT,
    "tokenizer_mode": _ABSENT,
    "tokenizer_kwargs": (None, {}, {"clean": "lower"}),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "final_ln_after_pool": (False, True),
    "pool_type": ("argmax",),
    "proj_bias": (False,),
    "proj_type": ("linear",),
}
# Further fields that only models of these packages read.
_FOREIGN = ("timm_", "hf_")
_RESIZES: Mapping[str, Literal["shortest_edge", "stretch"]] = {"shortest": "shortest_edge", "squash": "stretch"}
# `image_transform` in transform.py: "x or default".
_DEFAULT_FOR_EMPTY = ("mean", "std", "interpolation", "resize_mode")


def clip_architecture(checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> ClipArchitecture:
    """The architecture of weights with OpenAI's key names.

    Raises:
        InputError: `open_clip_config.json` describes a model that is not computed here, or not these weights.
        UsageError: the options do not fit the weights, or say what the checkpoint says itself.
    """
    stated = _stated(checkpoint)
    if stated is not None:
        refuse_choices(options, checkpoint)
        architecture = _with_margin(architecture_from_openai(checkpoint, stated), checkpoint)
        _check_sizes(checkpoint, architecture)
        return architecture
    told = ClipChoices.from_config(options.family_options)
    architecture = architecture_from_openai(checkpoint, told)
    width, heads = _vision_width(architecture), architecture.towers[0].heads
    if "head_width" in options.family_options and heads * told.head_width != width:
        raise UsageError(
            "the image encoder's width is not a multiple of head_width",
            where=checkpoint.source,
            expected=f"a divisor of {width}",
            got=str(told.head_width),
        )
    return architecture


def described_architecture(checkpoint: Checkpoint) -> ClipArchitecture:
    """`clip_architecture` before any option is known.

    Where nothing states the heads and 64 channels do not divide a width, they are taken as one channel wide, and one:
    only the options can say what they are, and `clip_architecture` refuses the weights without them.
    """
    try:
        return clip_architecture(checkpoint)
    except InputError:
        if _stated(checkpoint) is not None:
            raise
        return architecture_from_openai(checkpoint, ClipChoices(head_width=1, text_heads=1))


def with_plain_text_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the text encoder's keys as open_clip's `CLIP` has them.

    Its `CustomTextCLIP` (custom_text) computes the same, and has them under `text.`; see
    `convert_to_custom_text_state_dict` in open_clip's model.py.
    """
    names = {key.removeprefix("text."): key for key in checkpoint.tensors}
    if TEXT_MARK not in checkpoint.tensors or len(names) != len(checkpoint.tensors):
        return checkpoint
    read = checkpoint.read
    return replace(
        checkpoint,
        tensors={name: checkpoint.tensors[key] for name, key in names.items()},
        read=lambda name: read(names[name]),
    )


def refuse_sigmoid(checkpoint: Checkpoint) -> None:
    """InputError for weights of a sigmoid loss: their scores are not CLIP's softmax over texts."""
    if "logit_bias" in checkpoint.tensors:
        raise InputError(
            "these CLIP weights were trained with the sigmoid loss: their scores are sigmoid(scale * cosine + bias), "
            "which is not supported yet",
            where=f"{checkpoint.source}: tensor logit_bias",
            expected="CLIP's own loss, which has a logit_scale and no logit_bias",
            got="logit_bias",
            fix="for the embeddings alone, which do not depend on it, delete logit_bias from the state dict"
            + ("" if checkpoint.open_clip_config is None else f" and init_logit_bias from {FILE}"),
        )


def refuse_choices(options: BuildOptions, checkpoint: Checkpoint) -> None:
    """UsageError when the options say something about weights that say it themselves."""
    if given := options.family_options:
        raise UsageError(
            "this checkpoint says its activation and its attention heads itself",
            where=checkpoint.source,
            expected="no --set activation, head_width or text_heads",
            got=", ".join(f"{name}={value}" for name, value in given.items()),
            fix="leave these options out",
        )


def assumptions(
    checkpoint: Checkpoint, architecture: ClipArchitecture, options: BuildOptions = DEFAULT_BUILD
) -> tuple[str, ...]:
    """A warning that says what is assumed and what to pass; none where the checkpoint or the options say it."""
    if architecture.key_names != "openai" or _stated(checkpoint) is not None:
        return ()
    vision, text = architecture.towers
    head_width = _vision_width(architecture) // vision.heads
    texts = {
        "activation": "QuickGELU (else --set activation=gelu)",
        "head_width": f"attention heads of the image encoder {head_width} wide (else --set head_width=N)",
        "text_heads": f"{text.heads} attention heads of the text encoder (else --set text_heads=N)",
    }
    assumed = [what for name, what in texts.items() if name not in options.family_options]
    if not assumed:
        return ()
    return (
        f"the weights do not say what is assumed as in OpenAI's models: {', '.join(assumed)}. open_clip saves models "
        f"under the same names, usually trained with gelu, and its ViT-H, g and bigG have other heads; with a wrong "
        f"choice all embeddings are wrong, and verification cannot see it. Its {FILE} beside the weights says all",
    )


def open_clip_image(checkpoint: Checkpoint, image_size: int) -> Prepared | None:
    """How `open_clip_config.json` has images prepared, None without the file; InputError for what is not done here.

    Missing and null fields have open_clip's defaults; of four fields it takes the default for zero and empty values
    too. It ignores the stated size, and fields that it does not know.
    """
    if checkpoint.open_clip_config is None:
        return None
    section = _section(checkpoint.open_clip_config, "preprocess_cfg")
    config = {k: v for k, v in section.items() if v is not None and (v or k not in _DEFAULT_FOR_EMPTY)}
    where = f"{FILE}: preprocess_cfg."
    _choose(config, "mode", ("RGB",), where)
    # "random" is for training; images are then resized with the default.
    resample = _choose(config, "interpolation", ("bicubic", "bilinear", "random"), where)
    resize = _RESIZES[_choose(config, "resize_mode", tuple(_RESIZES), where)]
    mean, std = _channels(config, "mean", IMAGE_MEAN), _channels(config, "std", IMAGE_STD)
    if min(std) <= 0:
        raise _malformed("preprocess_cfg.std", "positive numbers", std)
    filter_: Resample = "bilinear" if resample == "bilinear" else "bicubic"
    spec = torchvision_image_spec(image_size, filter_, "after_crop", mean, std, resize)
    stated = {"resample": "interpolation", "mean": "mean", "std": "std"}
    stated |= dict.fromkeys(("resize", "resize_pixels", "crop"), "resize_mode")
    own = {f"image.{name}": f"{where}{key}" for name, key in stated.items() if key in config}
    defaults = {**same_origin(spec, "default of open_clip"), "image.size_pixels": f"{FILE}: model_cfg.vision_cfg"}
    ignored = dict.fromkeys(processor_files(checkpoint), f"open_clip reads {FILE} alone")
    return spec, Origins({**defaults, **own}, ignored)


def _stated(checkpoint: Checkpoint) -> ClipChoices | None:
    """What the checkpoint says; None where only the user knows."""
    if checkpoint.open_clip_config is None:
        is_openai = checkpoint.format == "random" or _OPENAI_MARK in checkpoint.tensors
        return OPENAI_CHOICES if is_openai else None
    model = _section(checkpoint.open_clip_config, "model_cfg")
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    _check_fields(model, _MODEL, "model_cfg")
    _check_fields(vision, _VISION, "model_cfg.vision_cfg")
    _check_fields(text, _TEXT, "model_cfg.text_cfg")
    return ClipChoices(
        activation="quick_gelu" if model.get("quick_gelu", False) else "gelu",
        head_width=config_integer(vision, "head_width", HEAD_WIDTH, FILE),
        text_heads=config_integer(text, "heads", 8, FILE),
    )


def _vision_width(architecture: ClipArchitecture) -> int:
    vision, _ = architecture.towers
    return vision.width if isinstance(vision, VitSizes) else 32 * vision.width


def _check_fields(section: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], name: str) -> None:
    for key, value in section.items():
        where = f"{FILE}: {name}.{key}"
        if key not in known:
            if key.startswith(_FOREIGN):
                continue
            raise InputError(
                "open_clip's config has a field that is not known here, and may change the model",
                where=where,
                got=repr(value)[:200],
                fix="where the field does not matter for this model, remove it; else it is not supported",
            )
        if known[key]:
            _choose(section, key, known[key], f"{FILE}: {name}.")


def _choose(section: Mapping[str, Any], key: str, choices: tuple[Any, ...], where: str) -> Any:
    """The field's value, the first choice without it; InputError when it is no choice."""
    value = section.get(key, choices[0])
    if value not in choices:
        raise InputError(
            "open_clip's config describes a model or a preprocessing that this project does not have",
            where=f"{where}{key}",
            expected=" or ".join(map(repr, choices)),
            got=repr(value)[:200],
            fix="this checkpoint cannot be exported",
        )
    return value


def _with_margin(architecture: ClipArchitecture, checkpoint: Checkpoint) -> ClipArchitecture:
    """For images of the stated size, where it is no multiple of the patch."""
    vision, config = architecture.vision, checkpoint.open_clip_config
    if config is None or not isinstance(vision, VitSizes):
        return architecture
    stated = _edge(_section(_section(config, "model_cfg"), "vision_cfg").get("image_size", 224))
    size = image_size_of(vision.image_size // vision.patch_size, vision.patch_size, stated)
    return replace(architecture, vision=replace(vision, image_size=size))


def _check_sizes(checkpoint: Checkpoint, architecture: ClipArchitecture) -> None:
    """InputError when the config's sizes are not the weights'."""
    if checkpoint.open_clip_config is None:
        return
    for field, stated, found in _sizes(_section(checkpoint.open_clip_config, "model_cfg"), architecture):
        if stated != found:
            raise InputError(
                f"{FILE} and the weights disagree",
                where=f"{checkpoint.source}: {FILE}: model_cfg.{field}",
                expected=f"{found}, as the weights have it",
                got=repr(stated)[:200],
                fix="get both files from the same publisher; open_clip may resample positions, this project does not",
            )


def _sizes(model: Mapping[str, Any], architecture: ClipArchitecture) -> Iterator[tuple[str, Any, Any]]:
    """Field, its value (open_clip's default where it is missing), and what the weights' shapes say."""
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    sizes, words = architecture.towers
    yield "embed_dim", model.get("embed_dim"), architecture.embed_dim
    yield "vision_cfg.width", vision.get("width", 768), sizes.width
    yield "vision_cfg.image_size", _edge(vision.get("image_size", 224)), sizes.image_size
    if isinstance(sizes, VitSizes):
        yield "vision_cfg.layers", vision.get("layers", 12), sizes.layers
        yield "vision_cfg.patch_size", _edge(vision.get("patch_size", 16)), sizes.patch_size
        yield "vision_cfg.mlp_ratio (hidden width)", _hidden(vision, sizes.width), sizes.hidden
    else:
        yield "vision_cfg.layers", vision.get("layers", 12), list(sizes.stages)
    yield "text_cfg.context_length", text.get("context_length", 77), words.context_length
    yield "text_cfg.vocab_size", text.get("vocab_size", 49408), words.vocab_size
    yield "text_cfg.width", text.get("width", 512), words.width
    yield "text_cfg.layers", text.get("layers", 12), words.layers
    yield "text_cfg.mlp_ratio (hidden width)", _hidden(text, words.width), words.hidden


def _hidden(section: Mapping[str, Any], width: int) -> int:
    # Bounded: the product of a large number may be infinite.
    return int(min(width * config_number(section, "mlp_ratio", 4.0, FILE), 2.0**53))


def _edge(value: Any) -> Any:
    """The edge of a square that is stated as a number or as a pair; anything else as it is."""
    is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if is_square else value


def _channels(config: Mapping[str, Any], key: str, default: Channels) -> Channels:
    value = config.get(key, default)
    values = [value] * 3 if isinstance(value, int | float) else value
    if isinstance(values, list) and len(values) == 1:
        values = values * 3
    is_triple = isinstance(values, list | tuple) and len(values) == 3
    if not is_triple or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise _malformed(f"preprocess_cfg.{key}", "a number or three", value)
    red, green, blue = map(float, values)
    return red, green, blue


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name, {} if name == "preprocess_cfg" else None)
    if not isinstance(section, Mapping):
        raise _malformed(name, "an object", section)
    return section


def _malformed(field: str, expected: str, got: Any) -> InputError:
    return InputError(f"{FILE} is malformed", where=f"{FILE}: {field}", expected=expected, got=repr(got)[:200])
