"""BLIP's sizes: from tensor shapes (Salesforce), from shapes and `config.json` (Hugging Face), from `configs/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.layers.bert import BertSizes
from vlm_export.models.layers.bert_weights import bert_sizes
from vlm_export.models.reading.shapes import (
    Shapes,
    check_context,
    check_heads,
    config_integer,
    config_number,
    config_section,
    image_size_of,
    needed_config,
)
from vlm_export.specs.codec import Spec
from vlm_export.specs.tasks import SpecialTokens

KeyNames = Literal["original", "huggingface"]
HEAD_WIDTH = 64
# salesforce/BLIP models/vit.py and configs/med_config.json (3a29b74).
VISION_EPS, TEXT_EPS = 1e-6, 1e-12
# bert-base-uncased's vocabulary.
CLS_ID, SEP_ID, PAD_ID = 101, 102, 0


@dataclass(frozen=True)
class BlipVitSizes(Spec):
    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    image_size: int
    eps: float


@dataclass(frozen=True)
class BlipArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        projection_dim: D of the contrastive space, 0 without projections.
        has_matching_head: image-text matching.
        encoder, decoder: the text transformers, None where the checkpoint has none.
        compares_images: the encoder attends to two images at once (NLVR).
    """

    key_names: KeyNames
    vision: BlipVitSizes
    encoder: BertSizes | None
    decoder: BertSizes | None
    projection_dim: int
    has_matching_head: bool
    tokens: SpecialTokens
    compares_images: bool = False

    @property
    def answers_questions(self) -> bool:
        """The decoder attends to question states, not to image tokens (VQA)."""
        return self.encoder is not None and self.decoder is not None and not self.has_matching_head

    @property
    def image_tokens(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2 + 1


def architecture_from_checkpoint(checkpoint: Checkpoint) -> BlipArchitecture:
    """Sizes from shapes; for Hugging Face directories heads, epsilons and token ids from config.json.

    Raises:
        InputError: tensors that determine the sizes are missing.
    """
    shapes = Shapes(checkpoint)
    huggingface = "vision_model.embeddings.class_embedding" in checkpoint.tensors
    text_config = config_section(checkpoint, "text_config") if huggingface else None
    has = checkpoint.tensors.__contains__
    encoder, decoder = (_text_sizes(shapes, prefix, text_config) for prefix in _TEXT_PREFIXES)
    if encoder is None and decoder is None:
        raise InputError("the checkpoint has no text transformer", where=checkpoint.source, expected="text_encoder.*")
    vocab_size = (encoder or decoder or _never()).vocab_size
    architecture = BlipArchitecture(
        key_names="huggingface" if huggingface else "original",
        vision=_huggingface_vision(shapes) if huggingface else _original_vision(shapes),
        encoder=encoder,
        decoder=decoder,
        projection_dim=shapes.of("vision_proj.weight", 2)[0] if has("vision_proj.weight") else 0,
        has_matching_head=has("itm_head.weight"),
        compares_images=has("cls_head.0.weight"),
        tokens=_tokens(text_config, vocab_size, decodes=decoder is not None),
    )
    return _checked(architecture, checkpoint)


_TEXT_PREFIXES = ("text_encoder.", "text_decoder.bert.")


def _never() -> BertSizes:
    raise AssertionError("one of the two is there")


def _text_sizes(shapes: Shapes, prefix: str, config: Mapping[str, Any] | None) -> BertSizes | None:
    """Sizes of the transformer whose keys start with `prefix`, None when there are no such keys.

    `config` is config.json's section, None for Salesforce's files. Defaults are those of `BlipTextConfig`.
    """
    keys = [key for key in shapes.checkpoint.tensors if key.startswith(prefix)]
    if not keys:
        return None
    width = shapes.of(f"{prefix}embeddings.position_embeddings.weight", 2)[1]
    default_heads = width // HEAD_WIDTH if config is None else 8
    config = config or {}
    _check_activation(config, "text_config")
    first = f"{prefix}encoder.layer.0."
    # transformers may store tied words only once, as the decoder's output matrix.
    tied = f"{prefix.removesuffix('bert.')}cls.predictions.decoder.weight"
    words = f"{prefix}embeddings.word_embeddings.weight"
    if words not in keys and tied in shapes.checkpoint.tensors:
        words = tied
    has_cross = any(".crossattention." in key for key in keys)
    # Pairs of images have two of each projection.
    twins = f"{first}crossattention.self0.key.weight"
    attended = twins if twins in keys else f"{first}crossattention.self.key.weight"
    return bert_sizes(
        shapes,
        prefix,
        heads=config_integer(config, "num_attention_heads", default_heads),
        eps=config_number(config, "layer_norm_eps", TEXT_EPS),
        words=words,
        states_width=shapes.of(attended, 2)[1] if has_cross else 0,
    )


def _original_vision(shapes: Shapes) -> BlipVitSizes:
    width, patch = shapes.patches("visual_encoder.patch_embed.proj.weight")
    return BlipVitSizes(
        width=width,
        layers=shapes.count("visual_encoder.blocks."),
        heads=width // HEAD_WIDTH,
        hidden=shapes.of("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=patch * shapes.grid("visual_encoder.pos_embed", 3),
        eps=VISION_EPS,
    )


def _huggingface_vision(shapes: Shapes) -> BlipVitSizes:
    config = config_section(shapes.checkpoint, "vision_config")
    needed_config(shapes.checkpoint, "BLIP", "the number of heads and the epsilons")
    _check_activation(config, "vision_config")
    width, patch = shapes.patches("vision_model.embeddings.patch_embedding.weight")
    return BlipVitSizes(
        width=width,
        layers=shapes.count("vision_model.encoder.layers."),
        heads=config_integer(config, "num_attention_heads", 12),
        hidden=shapes.of("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=image_size_of(
            shapes.grid("vision_model.embeddings.position_embedding", 3), patch, config.get("image_size")
        ),
        eps=config_number(config, "layer_norm_eps", 1e-5),
    )


def _check_activation(config: Mapping[str, Any], section: str) -> None:
    if config.get("hidden_act", "gelu") != "gelu":
        raise InputError(
            "BLIP with another activation than the published one is not supported",
            where=f"config.json: {section}.hidden_act",
            expected="gelu",
            got=repr(config["hidden_act"]),
        )


def _tokens(config: Mapping[str, Any] | None, vocab_size: int, *, decodes: bool) -> SpecialTokens:
    """The two added tokens are the vocabulary's last, [DEC] before [ENC], unless config.json says where [DEC] is.

    The ids of texts are the tokenizer's, once it is read; of config.json's, only those that decoding reads matter. What
    nobody reads, such as a default of bert-base-uncased beside a smaller vocabulary, becomes 0.
    """
    default_start = vocab_size - 2 if config is None else 30522
    is_original, config = config is None, config or {}

    def read(token_id: int, matters: bool) -> int:
        return token_id if matters or token_id < vocab_size else 0

    matters = decodes or is_original
    return SpecialTokens(
        cls=read(CLS_ID, is_original),
        sep=read(config_integer(config, "sep_token_id", SEP_ID), matters),
        pad=read(config_integer(config, "pad_token_id", PAD_ID), matters),
        decoder_start=read(config_integer(config, "bos_token_id", default_start), matters),
        encoder_start=vocab_size - 1,
    )


def _checked(architecture: BlipArchitecture, checkpoint: Checkpoint) -> BlipArchitecture:
    towers = (("vision", architecture.vision), ("text", architecture.encoder), ("decoder", architecture.decoder))
    for name, sizes in towers:
        if sizes is not None:
            check_heads(checkpoint, name, sizes.width, sizes.heads)
        if isinstance(sizes, BertSizes):
            check_context(checkpoint.source, sizes.positions)
    encoder_reads_states = architecture.has_matching_head or architecture.answers_questions
    for name, sizes, needed in (
        ("encoder", architecture.encoder, encoder_reads_states),
        ("decoder", architecture.decoder, True),
    ):
        if sizes is not None and needed and not sizes.states_width:
            raise InputError(
                f"the text {name} has no cross-attention", where=checkpoint.source, expected="crossattention.*"
            )
    tokens = architecture.tokens.to_json()
    sizes_ = architecture.encoder or architecture.decoder or _never()
    outside = {name: token for name, token in tokens.items() if token >= sizes_.vocab_size}
    if outside:
        raise InputError(
            "special tokens are outside the vocabulary",
            where=checkpoint.source,
            expected=f"ids below {sizes_.vocab_size}",
            got=str(outside),
        )
    return architecture
