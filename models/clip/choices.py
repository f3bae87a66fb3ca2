"""What shapes do not tell about CLIP weights with OpenAI's key names: the activation and the attention heads.

OpenAI's own archives are known. open_clip saves other models under the same names; where its `open_clip_config.json`
lies beside them, the family of open_clip reads both. Otherwise the user says it, or OpenAI's choices are assumed, with
a warning.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_export.errors import InputError, UsageError
from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint
from vlm_export.models.clip.architecture import (
    OPENAI_CHOICES,
    ClipArchitecture,
    ClipChoices,
    VitSizes,
    architecture_from_openai,
)

TEXT_MARK = "text.token_embedding.weight"
# OpenAI's archives, and state dicts taken out of them, carry the image size as a tensor; open_clip's never do.
_OPENAI_MARK = "input_resolution"


def clip_architecture(checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> ClipArchitecture:
    """The architecture of weights with OpenAI's key names.

    Raises:
        InputError: the shapes do not fit together.
        UsageError: the options do not fit the weights, or say what the checkpoint says itself.
    """
    if _is_openai(checkpoint):
        refuse_choices(options, checkpoint)
        return architecture_from_openai(checkpoint, OPENAI_CHOICES)
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
        if _is_openai(checkpoint):
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
            "and what else they differ in is not stated",
            where=f"{checkpoint.source}: tensor logit_bias",
            expected="CLIP's own loss, which has a logit_scale and no logit_bias",
            got="logit_bias",
            fix="put the model's open_clip_config.json beside the weights, which says the rest of it; or for the "
            "embeddings alone, which do not depend on it, delete logit_bias from the state dict",
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
    if architecture.key_names != "openai" or _is_openai(checkpoint):
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
        f"choice all embeddings are wrong, and verification cannot see it. Its open_clip_config.json beside the "
        "weights says all",
    )


def _is_openai(checkpoint: Checkpoint) -> bool:
    """Whether the choices are OpenAI's own."""
    return checkpoint.format == "random" or _OPENAI_MARK in checkpoint.tensors


def _vision_width(architecture: ClipArchitecture) -> int:
    vision, _ = architecture.towers
    return vision.width if isinstance(vision, VitSizes) else 32 * vision.width
