"""Chinese-CLIP's sizes: from tensor shapes (its authors' files), from shapes and `config.json` (transformers).

What shapes do not tell of the authors' files: OFA-Sys/Chinese-CLIP cn_clip/clip/model.py, utils.py and model_configs
(release 1.6.0). Defaults of `config.json`: transformers 5.23 configuration_chinese_clip.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    clip_tower_config,
    huggingface_vision,
    openai_resnet,
    openai_vit,
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

# `tokenize` of cn_clip cuts texts here, whatever positions there are.
MAX_TEXT_TOKENS = 52
# Of the image encoder, where it is not 64: ViT-H-14.json. By its width, which no other published one has.
_HEAD_WIDTHS = {1280: 80}


@dataclass(frozen=True)
class LibraryNames:
    """transformers' names for models of this form, and what its `config.json` leaves unsaid.

    Attributes:
        title: what people call such a model.
        model_type, class_name, image_class: of transformers.
        text_prefix: of the keys of the text encoder.
        heads, eps: defaults of the text encoder.
        vocabulary: whose the tokenizer is, with the ids that end and fill its texts.
        has_mapping: a norm and a layer stand between the text encoder and its projection.
        renamed: part of the keys in files, and what newer releases of the class have in its place.
    """

    title: str
    model_type: str
    class_name: str
    image_class: str
    text_prefix: str
    heads: int
    eps: float
    vocabulary: str
    end_token_id: int
    pad_token_id: int
    has_mapping: bool = False
    renamed: tuple[str, str] = ("", "")


CHINESE_CLIP = LibraryNames(
    title="Chinese-CLIP",
    model_type="chinese_clip",
    class_name="ChineseCLIPModel",
    image_class="ChineseCLIPImageProcessor",
    text_prefix="text_model.",
    heads=12,
    eps=1e-12,
    vocabulary="bert-base-chinese",
    end_token_id=102,
    pad_token_id=0,
)


@dataclass(frozen=True)
class ChineseClipArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        activation, eps: of the image encoder.
        token_types: rows of the text encoder's table of token types.
        padding_id: the token that RoBERTa does not count in its positions; None where BERT counts all.
        mapping: width of the layer between the text encoder and its projection; None without one.
    """

    key_names: Literal["original", "huggingface"]
    embed_dim: int
    activation: Activation
    eps: float
    vision: VitSizes | ResNetSizes
    text: BertSizes
    token_types: int
    padding_id: int | None = None
    mapping: int | None = None

    @property
    def image_encoder(self) -> ClipArchitecture:
        """The image encoder, which is CLIP's."""
        names: Literal["openai", "huggingface"] = "openai" if self.key_names == "original" else "huggingface"
        return ClipArchitecture(names, self.embed_dim, self.activation, self.eps, self.vision, None)

    @property
    def context_length(self) -> int:
        """The longest text, before a tokenizer has its say."""
        return min(MAX_TEXT_TOKENS, self.longest_text) if self.key_names == "original" else self.longest_text

    @property
    def longest_text(self) -> int:
        """Tokens that there are positions for; RoBERTa's begin after the row of its padding."""
        return self.text.positions - (0 if self.padding_id is None else self.padding_id + 1)


def is_original(checkpoint: Checkpoint) -> bool:
    """Whether the key names are the authors' own."""
    return "visual.conv1.weight" in checkpoint.tensors


def architecture_from_checkpoint(checkpoint: Checkpoint, library: LibraryNames) -> ChineseClipArchitecture:
    """Sizes from shapes; of transformers' form, heads, activation and epsilons from config.json.

    Raises:
        InputError: tensors that determine the sizes are missing, or config.json is missing or contradicts them.
    """
    has_own_names = is_original(checkpoint)
    architecture = _from_original(checkpoint) if has_own_names else _from_huggingface(checkpoint, library)
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
        bert_sizes(shapes, "bert.", heads=width // HEAD_WIDTH, eps=CHINESE_CLIP.eps),
        _token_types(shapes, "bert."),
    )


def _original_vision(checkpoint: Checkpoint) -> VitSizes | ResNetSizes:
    shapes = Shapes(checkpoint)
    if "visual.proj" not in checkpoint.tensors:
        return openai_resnet(shapes, HEAD_WIDTH)
    width, _ = shapes.patches("visual.conv1.weight")
    return openai_vit(shapes, _HEAD_WIDTHS.get(width, HEAD_WIDTH))


def _from_huggingface(checkpoint: Checkpoint, library: LibraryNames) -> ChineseClipArchitecture:
    config = needed_config(checkpoint, library.title, "the number of heads, the activation and the epsilons")
    vision, text = (clip_tower_config(checkpoint, tower) or {} for tower in ("vision", "text"))
    published = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
    check_implemented("config.json: text_config", text, published)
    shapes, embed_dim = Shapes(checkpoint), Shapes(checkpoint).of("visual_projection.weight", 2)[0]
    architecture = ChineseClipArchitecture(
        "huggingface",
        embed_dim,
        activation_of(vision.get("hidden_act", "quick_gelu")),
        config_number(vision, "layer_norm_eps", LAYER_NORM_EPS),
        huggingface_vision(shapes, vision),
        bert_sizes(
            shapes,
            library.text_prefix,
            heads=config_integer(text, "num_attention_heads", library.heads),
            eps=config_number(text, "layer_norm_eps", library.eps),
        ),
        _token_types(shapes, library.text_prefix),
    )
    if library.has_mapping:
        architecture = replace(
            architecture,
            padding_id=config_integer(text, "pad_token_id", library.pad_token_id),
            mapping=shapes.of("text_model.transformation.weight", 2)[0],
        )
    check_stated(checkpoint, "text_config", text, stated_text(architecture))
    check_stated(checkpoint, "", config, {"projection_dim": embed_dim})
    return architecture


def _token_types(shapes: Shapes, prefix: str) -> int:
    return shapes.of(f"{prefix}embeddings.token_type_embeddings.weight", 2)[0]


def stated_text(architecture: ChineseClipArchitecture) -> dict[str, int]:
    """The text encoder's sizes under config.json's names, without heads, which no tensor tells."""
    sizes = architecture.text
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "max_position_embeddings": sizes.positions,
        "vocab_size": sizes.vocab_size,
        "type_vocab_size": architecture.token_types,
        **({} if architecture.mapping is None else {"project_dim": architecture.mapping}),
    }
