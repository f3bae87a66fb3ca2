"""nanoVLM's sizes: from tensor shapes, and from `config.json` what shapes cannot say.

`config.json` is the dump of a dataclass that gained and lost fields (huggingface/nanoVLM models/config.py, v0.1 6ba9082
to 4e0c096): it is read as data, and a field that a version did not have yet takes that version's behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.layers.rotary_decoder import RotaryDecoderSizes
from vlm_export.models.layers.vit import VitForm
from vlm_export.models.reading.shapes import (
    Shapes,
    check_context,
    check_heads,
    check_stated,
    check_token,
    config_integer,
    config_number,
    config_section,
)
from vlm_export.specs.codec import Spec

Layout = Literal["prepended", "placeholders", "tiles"]
IMAGE_TOKEN, GLOBAL_IMAGE_TOKEN = "image_token", "global_image_token"
# The template of every published config that has one, for one message of the user.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# End of text: of cosmo2's tokenizer, and <|im_end|> of SmolLM2-Instruct's, which later versions take.
_FIRST_END_ID, _LATER_END_ID = 0, 2
# Published: 8192. Prompts are fed in pieces, so that only the cache grows with it.
LARGEST_CONTEXT = 1 << 20


@dataclass(frozen=True)
class ChatForm(Spec):
    """How a prompt is written.

    Attributes:
        extra_tokens: name ("image_token", "r1c1", …) → what the original appends to its tokenizer, in order of ids.
        max_prompt_tokens: the longest sequence of training.
        max_side_pixels: longest side of an image that is cut into tiles; 0 without tiles.
        resize_to_max_side: that side always becomes as long.
        has_template: prompts are messages in ChatML, as the config's template writes them.
    """

    layout: Layout
    end_token_id: int
    extra_tokens: Mapping[str, str]
    max_prompt_tokens: int | None = None
    max_side_pixels: int = 0
    resize_to_max_side: bool = False
    has_template: bool = False


@dataclass(frozen=True)
class NanoVlmArchitecture(Spec):
    """Everything that determines the modules, apart from weights, and how prompts are written.

    Attributes:
        pixel_shuffle: side of the squares of patches that become one feature.
    """

    vision: VitForm
    decoder: RotaryDecoderSizes
    pixel_shuffle: int
    chat: ChatForm

    @property
    def image_size(self) -> int:
        return self.vision.grid * self.vision.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.vision.grid // self.pixel_shuffle) ** 2

    @property
    def image_token_id(self) -> int | None:
        """The id of the placeholder: extra tokens have the last ids of the vocabulary."""
        names = list(self.chat.extra_tokens)
        first = self.decoder.vocab_size - len(names)
        return first + names.index(IMAGE_TOKEN) if IMAGE_TOKEN in names else None


def architecture_from_checkpoint(checkpoint: Checkpoint) -> NanoVlmArchitecture:
    """Sizes from shapes; heads of the image encoder, epsilons and the prompt's form from config.json.

    Raises:
        InputError: there is no config.json, or it and the tensors contradict each other.
    """
    config = checkpoint.config
    if config is None:
        raise InputError(
            "a nanoVLM checkpoint needs its config.json",
            where=checkpoint.source,
            expected="config.json beside the weights: it says how many heads there are and how prompts are written",
            got="no config.json",
            fix="put the model's config.json beside the weights file; the code that made both saves them together",
        )
    shapes = Shapes(checkpoint)
    vision, decoder = _vision(shapes, config), _decoder(shapes, config)
    projected = shapes.of("MP.proj.weight", 2)[1]
    chat = _chat(checkpoint, config)
    check_token(checkpoint, "lm_eos_token_id", chat.end_token_id, decoder.vocab_size)
    return _checked(NanoVlmArchitecture(vision, decoder, isqrt(projected // vision.width), chat), checkpoint, projected)


def config_from_architecture(architecture: NanoVlmArchitecture) -> dict[str, Any]:
    """`config.json` as such a checkpoint has it, without what only training reads."""
    vision, decoder, chat = architecture.vision, architecture.decoder, architecture.chat
    config: dict[str, Any] = {
        "vit_hidden_dim": vision.width,
        "vit_inter_dim": vision.hidden,
        "vit_patch_size": vision.patch_size,
        "vit_img_size": architecture.image_size,
        "vit_n_heads": vision.heads,
        "vit_n_blocks": vision.layers,
        "vit_ln_eps": vision.eps,
        "vit_cls_flag": False,
        "lm_hidden_dim": decoder.width,
        "lm_inter_dim": decoder.hidden,
        "lm_rms_eps": decoder.eps,
        "lm_re_base": decoder.rope_base,
        "lm_max_position_embeddings": decoder.positions,
        "lm_vocab_size": decoder.vocab_size,
        "lm_n_heads": decoder.heads,
        "lm_n_kv_heads": decoder.kv_heads,
        "lm_n_blocks": decoder.layers,
        "lm_attn_scaling": decoder.rope_scaling,
        "lm_tie_weights": decoder.tied,
        "mp_pixel_shuffle_factor": architecture.pixel_shuffle,
    }
    if chat.max_prompt_tokens is not None:
        config["lm_max_length"] = chat.max_prompt_tokens
    if chat.layout != "tiles":
        # The dump of the later versions names no end token: they ask the tokenizer.
        config["lm_eos_token_id"] = _FIRST_END_ID
    if chat.layout != "prepended":
        config["vlm_extra_tokens"] = dict(chat.extra_tokens)
        config["extra_token_amount"] = len(chat.extra_tokens)
        config["mp_image_token_length"] = architecture.tokens_per_tile
    if chat.layout == "tiles":
        config["max_img_size"] = chat.max_side_pixels
        config["resize_to_max_side_len"] = chat.resize_to_max_side
    if chat.has_template:
        config["lm_chat_template"] = CHAT_TEMPLATE
    return config


def _vision(shapes: Shapes, config: Mapping[str, Any]) -> VitForm:
    prefix = "vision_encoder."
    if config.get("vit_cls_flag"):
        raise InputError(
            "a class token leaves no grid of patches to shuffle",
            where=f"{shapes.checkpoint.source}: config.json: vit_cls_flag",
            expected="false, as in every published nanoVLM",
            got=repr(config["vit_cls_flag"]),
        )
    width, patch = shapes.patches(f"{prefix}patch_embedding.conv.weight")
    return VitForm(
        width=width,
        layers=shapes.count(f"{prefix}blocks."),
        heads=config_integer(config, "vit_n_heads", 12),
        hidden=shapes.of(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        grid=shapes.grid(f"{prefix}patch_embedding.position_embedding", 3, prefix_tokens=0),
        activation="gelu_tanh",
        eps=config_number(config, "vit_ln_eps", 1e-6),
        has_class_token=False,
    )


def _decoder(shapes: Shapes, config: Mapping[str, Any]) -> RotaryDecoderSizes:
    prefix, tied = "decoder.", config.get("lm_tie_weights", True)
    if not isinstance(tied, bool):
        raise InputError("config.json is malformed", where="config.json: lm_tie_weights", expected="true or false")
    names = [name for name in ("head", "token_embedding") if f"{prefix}{name}.weight" in shapes.checkpoint.tensors]
    vocab_size, width = shapes.of(f"{prefix}{names[0] if names else 'head'}.weight", 2)
    head_width = 2 * shapes.of(f"{prefix}rotary_embd.inv_freq", 1)[0]
    return RotaryDecoderSizes(
        width=width,
        layers=shapes.count(f"{prefix}blocks."),
        heads=max(width // head_width, 1),
        kv_heads=max(shapes.of(f"{prefix}blocks.0.attn.k_proj.weight", 2)[0] // head_width, 1),
        hidden=shapes.of(f"{prefix}blocks.0.mlp.gate_proj.weight", 2)[0],
        vocab_size=vocab_size,
        positions=_positions(config),
        eps=config_number(config, "lm_rms_eps", 1e-5),
        rope_base=config_number(config, "lm_re_base", 100000.0),
        rope_scaling=config_number(config, "lm_attn_scaling", 1.0),
        tied=tied,
    )


def _positions(config: Mapping[str, Any]) -> int:
    """The longest sequence: no tensor is as long, so config.json alone says it."""
    positions = max(config_integer(config, "lm_max_position_embeddings", 8192), 1)
    check_context("config.json: lm_max_position_embeddings", positions, LARGEST_CONTEXT)
    return positions


def _chat(checkpoint: Checkpoint, config: Mapping[str, Any]) -> ChatForm:
    extra = {str(name): token for name, token in config_section(checkpoint, "vlm_extra_tokens").items()}
    if not all(isinstance(token, str) and token and token.isprintable() for token in extra.values()):
        raise InputError(
            "config.json is malformed",
            where="config.json: vlm_extra_tokens",
            expected="names and printable tokens",
            got=f"{extra!r:.200}",
        )
    longest = config_integer(config, "lm_max_length", 0) or None
    if IMAGE_TOKEN not in extra:
        end = config_integer(config, "lm_eos_token_id", _FIRST_END_ID)
        return ChatForm("prepended", end, {}, longest)
    has_template = _has_template(config, has_tiles=len(extra) > 1)
    if len(extra) == 1:
        return ChatForm("placeholders", _LATER_END_ID, extra, longest, has_template=has_template)
    side = config_integer(config, "max_img_size", 0)
    if not side:
        raise InputError(
            "config.json does not say how images are cut",
            where=f"{checkpoint.source}: config.json: max_img_size",
            expected="the longest side of an image in pixels, since vlm_extra_tokens names places of tiles",
            got="nothing",
        )
    resize = config.get("resize_to_max_side_len") is True
    return ChatForm("tiles", _LATER_END_ID, extra, longest, side, resize, has_template)


def _has_template(config: Mapping[str, Any], *, has_tiles: bool) -> bool:
    """Whether the config has a template, which is the published one: templates are programs, compared and never run."""
    stated = config.get("lm_chat_template")
    if stated is None and not has_tiles:
        return False
    if (stated.replace("\\n", "\n") if isinstance(stated, str) else stated) != CHAT_TEMPLATE:
        raise InputError(
            "the way in which prompts are written is not known",
            where="config.json: lm_chat_template",
            expected="the ChatML template of nanoVLM's own config" + ("" if has_tiles else ", or none"),
            got=repr(stated)[:200],
            fix="only the templates of published checkpoints are supported; a template is never executed",
        )
    return True


def _checked(architecture: NanoVlmArchitecture, checkpoint: Checkpoint, projected: int) -> NanoVlmArchitecture:
    vision, decoder, factor = architecture.vision, architecture.decoder, architecture.pixel_shuffle
    check_heads(checkpoint, "vision", vision.width, vision.heads)
    check_heads(checkpoint, "decoder", decoder.width, decoder.heads)
    check_heads(checkpoint, "decoder's query", decoder.heads, decoder.kv_heads)
    if factor < 1 or projected != vision.width * factor**2 or vision.grid % factor:
        raise InputError(
            "the projection does not fit squares of patches",
            where=f"{checkpoint.source}: tensor MP.proj.weight",
            expected=f"{vision.width} columns times a square number whose root divides {vision.grid}",
            got=f"{projected} columns",
        )
    stated = {
        "vit_img_size": architecture.image_size,
        "lm_n_heads": decoder.heads,
        "lm_n_kv_heads": decoder.kv_heads,
        "mp_pixel_shuffle_factor": factor,
        "mp_image_token_length": architecture.tokens_per_tile,
        "lm_vocab_size": decoder.vocab_size,
    }
    if extra := len(architecture.chat.extra_tokens):
        stated |= {"extra_token_amount": extra, "lm_base_vocab_size": decoder.vocab_size - extra}
    check_stated(checkpoint, "", checkpoint.config or {}, stated)
    return architecture
