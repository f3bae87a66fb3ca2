"""Jina CLIP's sizes: from shapes, from `config.json`, and from what the text encoder's Hub id stands for.

`config.json` names the text encoder by a Hub id, and its own code reads that model's config there. Here what the two
published ids state is data, and `hf_model_config_kwargs` changes it, as in the original.

Sources: jinaai/jina-clip-implementation configuration_clip.py, modeling_clip.py, hf_model.py and eva_model.py; the
config.json of jinaai/jina-clip-v1, jina-clip-v2, jina-embeddings-v3 and jina-bert-flash-implementation (b78d159);
configuration_bert.py of the latter, configuration_xlm_roberta.py of jinaai/xlm-roberta-flash-implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint
from vlm_export.models.reading.shapes import (
    Shapes,
    check_heads,
    check_implemented,
    check_stated,
    config_integer,
    config_number,
    config_section,
    image_size_of,
    needed_config,
)
from vlm_export.specs.codec import Spec, between

VISION, TEXT = "vision_model.", "text_model.transformer."
# XLMRobertaLoRA holds the encoder under a name of its own.
XLM_TEXT = f"{TEXT}roberta."
ORIGINAL, LORA_A, LORA_B = (f".parametrizations.weight.{name}" for name in ("original", "0.lora_A", "0.lora_B"))
# `encode_text` cuts texts here unless it is told otherwise.
MAX_TEXT_TOKENS = 512
LONGEST_TEXT = 8192
TextKind: TypeAlias = Literal["jina-bert", "jina-xlm-roberta"]


@dataclass(frozen=True)
class EvaSizes(Spec):
    """Sizes of EVA-02: rotary positions beside learned ones, SwiGLU, and a norm inside of both branches.

    Attributes:
        reference_grid: patches per side whose distances the rotary positions were trained with; a grid of another
            size is stretched to it.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    image_size: int
    reference_grid: int

    @property
    def grid(self) -> int:
        """Patches per side; a margin of an image that fills no patch is not seen."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LoraForm(Spec):
    """Adapters that lie beside the text encoder's weights: W + alpha / rank · B A.

    Attributes:
        tasks: what each of the adapters is for, in the order in which they are stored.
        task: the one that texts are encoded with; None for none of them.
    """

    tasks: tuple[str, ...]
    rank: Annotated[int, between(1)]
    alpha: float
    task: str | None

    def check(self) -> None:
        if self.task is not None and self.task not in self.tasks:
            raise self.refusal("task", f"nothing (null), or one of {', '.join(self.tasks)}")


@dataclass(frozen=True)
class JinaTextSizes(Spec):
    """Sizes of the text encoder: JinaBERT (ALiBi, GLU) or Jina's XLM-RoBERTa (rotary positions).

    Attributes:
        rotary_base: of the rotary positions; 0 where ALiBi stands for positions.
        pad_id: what texts are filled up with, and what is not seen.
    """

    kind: TextKind
    width: int
    layers: int
    heads: int
    hidden: int
    vocab_size: int
    token_types: int
    eps: float
    rotary_base: float
    pad_id: int
    lora: LoraForm | None = None


@dataclass(frozen=True)
class JinaClipArchitecture(Spec):
    """Everything that determines the modules, apart from weights.

    Attributes:
        matryoshka: lengths to which embeddings were trained to be cut.
        truncate_dim: the length to which they are cut; None for all of them.
        max_length: the longest text in tokens.
    """

    vision: EvaSizes
    text: JinaTextSizes
    matryoshka: tuple[int, ...] = ()
    truncate_dim: int | None = None
    max_length: Annotated[int, between(2, LONGEST_TEXT)] = MAX_TEXT_TOKENS

    def check(self) -> None:
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= self.vision.width:
            raise self.refusal("truncate_dim", f"an integer from 1 to {self.vision.width}, or nothing (null)")

    @property
    def embed_dim(self) -> int:
        """Numbers of an embedding."""
        return self.truncate_dim or self.vision.width


@dataclass(frozen=True)
class JinaClipOptions(Spec):
    """Arguments of the original's `encode_image` and `encode_text`.

    Attributes:
        truncate_dim: embeddings are cut to so many numbers; 0 for what config.json says.
        max_length: texts are cut to so many tokens.
    """

    truncate_dim: Annotated[int, between(0)] = 0
    max_length: Annotated[int, between(2, LONGEST_TEXT)] = MAX_TEXT_TOKENS


@dataclass(frozen=True)
class _Published:
    """A text encoder by its Hub id: what its own config.json states, and which values of it are computed here."""

    kind: TextKind
    stated: Mapping[str, Any]
    implemented: Mapping[str, tuple[Any, ...]]


_FIX = "take the config.json that the publisher saved"
_PUBLISHED: Mapping[str, _Published] = {
    "jinaai/jina-bert-flash-implementation": _Published(
        "jina-bert",
        {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "pad_token_id": 0},
        {"mlp_type": ("glu",), "use_qk_norm": (False,), "window_size": ([-1, -1],), "hidden_act": ("gelu",)},
    ),
    "jinaai/jina-embeddings-v3": _Published(
        "jina-xlm-roberta",
        {
            **{"num_attention_heads": 16, "layer_norm_eps": 1e-5, "pad_token_id": 1, "rotary_emb_base": 20000.0},
            **{"lora_rank": 4, "lora_alpha": 1},
            "lora_adaptations": [
                "retrieval.query",
                "retrieval.passage",
                "separation",
                "classification",
                "text-matching",
            ],
        },
        {
            **{"position_embedding_type": ("rotary",), "hidden_act": ("gelu",), "rotary_emb_interleaved": (False,)},
            "rotary_emb_scale_base": (None,),
        },
    ),
}
_VISION_DEFAULTS: Mapping[str, Any] = {
    **{"embed_dim": 768, "width": 768, "image_size": 224, "patch_size": 16, "layers": 12, "head_width": 64},
    **{"mlp_ratio": 4.0, "ls_init_value": None, "qkv_bias": True, "post_norm": False, "rope_embeddings": False},
    **{"pt_hw_seq_len": 16, "intp_freq": False, "naive_swiglu": False, "subln": False, "proj_type": None},
}
# Of the forms that EVA's code has, this one was published; its defaults are another one.
_VISION_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    **{"ls_init_value": (None,), "qkv_bias": (True,), "post_norm": (False,), "rope_embeddings": (True,)},
    **{"naive_swiglu": (True,), "subln": (True,), "proj_type": (None,)},
}


def architecture_from_checkpoint(checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> JinaClipArchitecture:
    """Sizes from shapes; heads, positions and adapters from config.json.

    Raises:
        InputError: config.json is missing, contradicts the tensors, or asks for what is not computed here.
        UsageError: the options ask for more than the model has.
    """
    config = needed_config(checkpoint, "Jina CLIP", "which text encoder it is, its heads and its positions")
    check_implemented("config.json", config, {"add_projections": (False,)})
    vision, text = _vision(checkpoint), _text(checkpoint)
    if vision.width != text.width:
        raise InputError(
            "the two encoders give embeddings of different lengths",
            where=checkpoint.source,
            expected="the same width, as without projections (add_projections)",
            got=f"vision {vision.width}, text {text.width}",
        )
    told = JinaClipOptions.from_config(options.family_options)
    if told.truncate_dim > vision.width:
        raise UsageError(
            "embeddings are not that long",
            where="--set truncate_dim",
            expected=f"at most {vision.width}",
            got=str(told.truncate_dim),
        )
    stated = {key: config[key] for key in ("truncate_dim", "matryoshka_dimensions") if config.get(key) is not None}
    data = {
        "vision": vision.to_json(),
        "text": text.to_json(),
        "matryoshka": stated.get("matryoshka_dimensions", []),
        "truncate_dim": told.truncate_dim or stated.get("truncate_dim"),
        "max_length": told.max_length,
    }
    return JinaClipArchitecture.from_json(data, "config.json", fix=_FIX)


def _vision(checkpoint: Checkpoint) -> EvaSizes:
    section = {**_VISION_DEFAULTS, **config_section(checkpoint, "vision_config")}
    check_implemented("config.json: vision_config", section, _VISION_IMPLEMENTED)
    shapes = Shapes(checkpoint)
    width, patch = shapes.patches(f"{VISION}patch_embed.proj.weight")
    grid = shapes.grid(f"{VISION}pos_embed", 3)
    hidden = shapes.of(f"{VISION}blocks.0.mlp.w1.weight", 2)[0]
    head_width = config_integer(section, "head_width", 64)
    if head_width == 0 or head_width % 4:
        raise InputError(
            "the image encoder's heads have a width that rotary positions cannot turn",
            where="config.json: vision_config.head_width",
            expected="a multiple of 4: pairs for rows, and pairs for columns",
            got=str(head_width),
            fix=_FIX,
        )
    check_heads(checkpoint, "vision", width, width // head_width)
    layers = shapes.count(f"{VISION}blocks.")
    image_size = image_size_of(grid, patch, section["image_size"])
    derived = {"width": width, "embed_dim": width, "layers": layers, "patch_size": patch, "image_size": image_size}
    check_stated(checkpoint, "vision_config", section, derived)
    ratio = config_number(section, "mlp_ratio", 4.0)
    if int(width * ratio) != hidden:
        check_stated(checkpoint, "vision_config", section, {"mlp_ratio": hidden / width})
    reference = config_integer(section, "pt_hw_seq_len", 16)
    if reference != grid and not section["intp_freq"]:
        raise InputError(
            "the rotary positions are of another grid than the images, and nothing stretches them (intp_freq)",
            where="config.json: vision_config.pt_hw_seq_len",
            expected=f"{grid}, or intp_freq true",
            got=str(reference),
            fix="take the config.json that was saved with these weights",
        )
    return EvaSizes(width, layers, width // head_width, hidden, patch, image_size, reference)


def _text(checkpoint: Checkpoint) -> JinaTextSizes:
    section, where = config_section(checkpoint, "text_config"), "config.json: text_config"
    published = _published(section.get("hf_model_name_or_path"))
    changed = section.get("hf_model_config_kwargs") or {}
    if not isinstance(changed, Mapping):
        raise InputError(
            "config.json is malformed",
            where=f"{where}.hf_model_config_kwargs",
            expected="an object",
            got=f"{changed!r:.200}",
        )
    # The pooler that a missing one stands for is another one for BERT.
    pooler = {"pooler_type": section.get("pooler_type") or _default_pooler(published.kind)}
    implemented = {"pooler_type": ("mean_pooler",), "proj_type": (None,), "default_instruction_task": (None,)}
    check_implemented(where, {**section, **pooler}, implemented)
    stated = {**published.stated, **changed}
    check_implemented(f"{where}.hf_model_config_kwargs", stated, published.implemented)
    sizes = _text_sizes(checkpoint, published.kind, stated, section.get("default_lora_task"))
    check_heads(checkpoint, "text", sizes.width, sizes.heads)
    check_stated(checkpoint, "text_config", section, {"embed_dim": sizes.width})
    check_stated(checkpoint, "text_config.hf_model_config_kwargs", changed, stated_sizes(sizes))
    return sizes


def _default_pooler(kind: TextKind) -> str:
    return "cls_pooler" if kind == "jina-bert" else "mean_pooler"


def _published(name: Any) -> _Published:
    if name not in _PUBLISHED:
        raise InputError(
            "config.json names a text encoder that is not computed here",
            where="config.json: text_config.hf_model_name_or_path",
            expected=" or ".join(_PUBLISHED),
            got=f"{name!r:.200}",
            fix=suggestion(str(name), tuple(_PUBLISHED))
            or "where it is a copy of one of these, name that one, and put what the copy's config.json has otherwise "
            "into hf_model_config_kwargs",
        )
    return _PUBLISHED[str(name)]


def _text_sizes(checkpoint: Checkpoint, kind: TextKind, stated: Mapping[str, Any], task: Any) -> JinaTextSizes:
    shapes, prefix = Shapes(checkpoint), XLM_TEXT if kind == "jina-xlm-roberta" else TEXT
    has_lora = f"{prefix}embeddings.word_embeddings{ORIGINAL}" in checkpoint.tensors
    end = ORIGINAL if has_lora else ".weight"
    vocab_size, width = shapes.of(f"{prefix}embeddings.word_embeddings{end}", 2)
    mlp = "wo.weight" if kind == "jina-bert" else f"fc2{end}"
    lora = None
    if has_lora:
        data = {"tasks": stated["lora_adaptations"], "rank": stated["lora_rank"], "alpha": stated["lora_alpha"]}
        where = "config.json: text_config (lora_*, default_lora_task)"
        lora = LoraForm.from_json({**data, "task": task}, where, fix=_FIX)
    return JinaTextSizes(
        kind=kind,
        width=width,
        layers=shapes.count(f"{prefix}encoder.layers."),
        heads=config_integer(stated, "num_attention_heads", 0),
        hidden=shapes.of(f"{prefix}encoder.layers.0.mlp.{mlp}", 2)[1],
        vocab_size=vocab_size,
        token_types=shapes.of(f"{prefix}embeddings.token_type_embeddings{end}", 2)[0],
        eps=config_number(stated, "layer_norm_eps", 0.0),
        rotary_base=config_number(stated, "rotary_emb_base", 0.0) if "rotary_emb_base" in stated else 0.0,
        pad_id=config_integer(stated, "pad_token_id", 0),
        lora=lora,
    )


def stated_sizes(sizes: JinaTextSizes) -> dict[str, int]:
    """The text encoder's sizes that shapes tell, under the names of its config."""
    return {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "intermediate_size": sizes.hidden,
        "vocab_size": sizes.vocab_size,
        "type_vocab_size": sizes.token_types,
    }


def config_from_architecture(architecture: JinaClipArchitecture) -> dict[str, Any]:
    """`config.json` as the publisher saves it."""
    vision, text = architecture.vision, architecture.text
    name = next(name for name, published in _PUBLISHED.items() if published.kind == text.kind)
    kwargs: dict[str, Any] = {
        **stated_sizes(text),
        "num_attention_heads": text.heads,
        "layer_norm_eps": text.eps,
        "pad_token_id": text.pad_id,
    }
    if text.rotary_base:
        kwargs["rotary_emb_base"] = text.rotary_base
    if text.lora is not None:
        kwargs |= {"lora_adaptations": list(text.lora.tasks), "lora_rank": text.lora.rank}
        kwargs |= {"lora_alpha": text.lora.alpha}
    return {
        "model_type": "jina_clip",
        "architectures": ["JinaCLIPModel"],
        "add_projections": False,
        "projection_dim": architecture.embed_dim,
        "matryoshka_dimensions": list(architecture.matryoshka) or None,
        "truncate_dim": architecture.truncate_dim,
        "text_config": {
            "model_type": "jina_clip_text",
            "embed_dim": text.width,
            "hf_model_name_or_path": name,
            "hf_model_config_kwargs": kwargs,
            "default_lora_task": text.lora.task if text.lora else None,
            "pooler_type": "mean_pooler",
            "proj_type": None,
        },
        "vision_config": {
            "model_type": "jina_clip_vision",
            "embed_dim": vision.width,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": vision.hidden / vision.width,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "pt_hw_seq_len": vision.reference_grid,
            "intp_freq": vision.reference_grid != vision.grid,
            **{"rope_embeddings": True, "naive_swiglu": True, "subln": True, "qkv_bias": True},
            **{"post_norm": False, "ls_init_value": None, "proj_type": None},
        },
    }
