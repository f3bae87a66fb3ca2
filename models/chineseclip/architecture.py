"""Chinese-CLIP's sizes: from tensor shapes (its authors' files), from shapes and `config.json` (transformers).

What shapes do not tell of the authors' files: OFA-Sys/Chinese-CLIP cn_clip/clip/model.py, utils.py and model_configs
(release 1.6.0). Defaults of `config.json`: transformers 5.23 configuration_chinese_clip.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm_export.family import Checkpoint
from vlm_export.models.clip.architecture import (
    HEAD_WIDTH,
    LAYER_NORM_EPS,
    ClipArchitecture,
    ResNetSizes,
    VitSizes,
    activation_of,
    checked,
    huggingface_vision,
    openai_resnet,
    openai_vit,
    tower_config,
)
from vlm_export.models.layers.bert import BertSizes
from vlm_export.models.layers.bert_weights import bert_sizes
from vlm_export.models.layers.blocks import Activation
from vlm_export.models.reading.shapes import (
    Shapes,
    check_context,
    check_heads,
    check_implemented,
    check_stated,
    config_integer,
    config_number,
    needed_config,
)
from vlm_export.specs.codec import Spec

TEXT_EPS = 1e-12
# `tokenize` of cn_clip cuts texts here, whatever positions there are.
MAX_TEXT_TOKENS = 52
# Of the image encoder, where it is not 64: ViT-H-14.json. By its width, which no other published one has.
_HEAD_WIDTHS = {1280: 80}
TEXT_PREFIXES = {"original": "bert.", "huggingface": "text_model."}


@dataclass(frozen=True)
class ChineseClipArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        activation, eps: of the image encoder.
        token_types: rows of the text encoder's table of token types.
    """

    key_names: Literal["original", "huggingface"]
    embed_dim: int
    activation: Activation
    eps: float
    vision: VitSizes | ResNetSizes
    text: BertSizes
    token_types: int

    @property
    def image_encoder(self) -> ClipArchitecture:
        """The image encoder, which is CLIP's."""
        names: Literal["openai", "huggingface"] = "openai" if self.key_names == "original" else "huggingface"
        return ClipArchitecture(names, self.embed_dim, self.activation, self.eps, self.vision, None)

    @property
    def context_length(self) -> int:
        """The longest text, before a tokenizer has its say."""
        return min(MAX_TEXT_TOKENS, self.text.positions) if self.key_names == "original" else self.text.positions


def is_original(checkpoint: Checkpoint) -> bool:
    """Whether the key names are the authors' own."""
    return "visual.conv1.weight" in checkpoint.tensors


def architecture_from_checkpoint(checkpoint: Checkpoint) -> ChineseClipArchitecture:
    """Sizes from shapes; of transformers' form, heads, activation and epsilons from config.json.

    Raises:
        InputError: tensors that determine the sizes are missing, or config.json is missing or contradicts them.
    """
    architecture = _from_original(checkpoint) if is_original(checkpoint) else _from_huggingface(checkpoint)
    checked(architecture.image_encoder, checkpoint)
    check_heads(checkpoint, "text", architecture.text.width, architecture.text.heads)
    check_context(checkpoint.source, architecture.text.positions)
    return architecture


def _from_original(checkpoint: Checkpoint) -> ChineseClipArchitecture:
    shapes, vision = Shapes(checkpoint), _original_vision(checkpoint)
    width = shapes.of("bert.embeddings.word_embeddings.weight", 2)[1]
    return ChineseClipArchitecture(
        "original",
        shapes.of("text_projection", 2)[1],
        "quick_gelu",
        LAYER_NORM_EPS,
        vision,
        bert_sizes(shapes, "bert.", heads=width // HEAD_WIDTH, eps=TEXT_EPS),
        _token_types(shapes, "bert."),
    )


def _original_vision(checkpoint: Checkpoint) -> VitSizes | ResNetSizes:
    shapes = Shapes(checkpoint)
    if "visual.proj" not in checkpoint.tensors:
        return openai_resnet(shapes, HEAD_WIDTH)
    width, _ = shapes.patches("visual.conv1.weight")
    return openai_vit(shapes, _HEAD_WIDTHS.get(width, HEAD_WIDTH))


def _from_huggingface(checkpoint: Checkpoint) -> ChineseClipArchitecture:
    config = needed_config(checkpoint, "Chinese-CLIP", "the number of heads, the activation and the epsilons")
    vision, text = tower_config(checkpoint, "vision") or {}, tower_config(checkpoint, "text") or {}
    published = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
    check_implemented("config.json: text_config", text, published)
    shapes = Shapes(checkpoint)
    sizes = bert_sizes(
        shapes,
        "text_model.",
        heads=config_integer(text, "num_attention_heads", 12),
        eps=config_number(text, "layer_norm_eps", TEXT_EPS),
    )
    token_types = _token_types(shapes, "text_model.")
    check_stated(checkpoint, "text_config", text, stated_text(sizes, token_types))
    embed_dim = shapes.of("visual_projection.weight", 2)[0]
    check_stated(checkpoint, "", config, {"projection_dim": embed_dim})
    return ChineseClipArchitecture(
        "huggingface",
        embed_dim,
        activation_of(vision.get("hidden_act", "quick_gelu")),
        config_number(vision, "layer_norm_eps", LAYER_NORM_EPS),
        huggingface_vision(shapes, vision),
        sizes,
        token_types,
    )


def _token_types(shapes: Shapes, prefix: str) -> int:
    return shapes.of(f"{prefix}embeddings.token_type_embeddings.weight", 2)[0]


def stated_text(sizes: BertSizes, token_types: int) -> dict[str, int]:
    """The text encoder's sizes under config.json's names, without heads, which no tensor tells."""
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "max_position_embeddings": sizes.positions,
        "vocab_size": sizes.vocab_size,
        "type_vocab_size": token_types,
    }
