"""open_clip: whatever `open_clip_config.json` describes, with encoders of its own, of timm and of transformers.

Source: open_clip 3.3.0, factory.py (`create_model`, `get_tokenizer`) and model.py (`CLIP`, `CustomTextCLIP`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vlm_export.errors import InputError, UsageError
from vlm_export.family import (
    DEFAULT_BUILD,
    Array,
    BuildOptions,
    Checkpoint,
    Description,
    Model,
    Part,
    StoredTensorInfo,
    WeightStore,
    outlines,
    reference_from_module,
)
from vlm_export.models.clip.weights import OPENAI_ROOTS
from vlm_export.models.openclip import original as openclip_original
from vlm_export.models.openclip.apple import is_apple, with_open_clip_names
from vlm_export.models.openclip.config import (
    FILE,
    OpenClipArchitecture,
    open_clip_image,
    read_architecture,
)
from vlm_export.models.openclip.hf_text import hf_encoder, pooler_of, text_pad_id, text_vocab_size
from vlm_export.models.openclip.hub_config import hub_config
from vlm_export.models.openclip.towers import OpenClipEncoders, build_encoders, reparameterise, sees_padding
from vlm_export.models.openclip.weights import BIAS_KEY, TEXT_MARKS, text_prefix, weight_table, with_zero_bias
from vlm_export.models.reading.image_processor import Prepared, processor_files, with_chosen_size
from vlm_export.models.reading.images import ImageExamples, apply_image_size, image_shape
from vlm_export.models.reading.token_ids import EDGES, random_ids
from vlm_export.models.reading.weights import Target, load_weights, published_tensors
from vlm_export.specs import Origins, TextCleaning, TextPooling, TextSpec
from vlm_export.specs.codec import Spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

BATCH = Axis("batch")
# OpenAI's vocabulary: the last id ends a text.
_END_ID = 49407
_MODEL_OPTION = "model"


@dataclass(frozen=True)
class OpenClipOptions(Spec):
    """What weights without an open_clip_config.json do not say.

    Attributes:
        model: the name by which open_clip knows the model, as `ViT-B-16-SigLIP`.
    """

    model: str = ""


_NO_BIAS = "the config states init_logit_bias and the weights have none: it is zero, as where open_clip loads them"


class OpenClipFamily:
    """Checkpoints that open_clip saved, beside their config."""

    name = "openclip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = OpenClipOptions
    marks: tuple[str, ...] = ("logit_scale", "visual.conv1.weight")
    roots: tuple[str, ...] = (*OPENAI_ROOTS, "text_projection", "image_encoder", "text_encoder")
    config_types: Mapping[str, tuple[str, ...]] = {}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        has_encoders = any(key.startswith("visual.") for key in keys) and any(map(_is_text_key, keys))
        made = checkpoint.config if checkpoint.format == "random" else None
        has_config = FILE in checkpoint.side_configs or "model_cfg" in (made or {})
        return is_apple(checkpoint) or (has_encoders and (has_config or any(map(_is_no_clip_key, keys))))

    def describe(self, checkpoint: Checkpoint) -> Description:
        stated = stated_by(checkpoint)
        architecture = stated.architecture
        encoders = build_encoders(architecture)
        image, origins = stated.image(checkpoint)
        return Description(
            architecture.to_json(),
            outlines(_parts(architecture, encoders)),
            tuple(_notes(architecture)),
            image=image,
            text=_text_spec(architecture),
            origins=origins | _text_origins(architecture),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        stated = stated_by(checkpoint, options)
        architecture, checkpoint = stated.architecture, with_open_clip_names(checkpoint)
        warnings = stated.warnings
        if architecture.init_logit_bias is not None and BIAS_KEY not in checkpoint.tensors:
            checkpoint, warnings = with_zero_bias(checkpoint), (*warnings, _NO_BIAS)
        encoders = build_encoders(architecture)
        dropped = load_weights(encoders, checkpoint, _table(architecture, encoders, checkpoint), store)
        if architecture.vision_cfg.timm_model_name:
            reparameterise(encoders.vision)
        size = apply_image_size(encoders.vision, architecture.vision_cfg.image_edge, options)
        parts = tuple(_parts(architecture, encoders, size, dynamic_image_size=options.dynamic_image_size))
        image, origins = with_chosen_size(stated.image(checkpoint), size)
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=hub_config(architecture, size),
            tasks=(_embed_task(encoders),),
            dropped_keys=dropped,
            references={part.name: partial(reference_from_module, part) for part in parts},
            reference_name="unpatched eager module",
            warnings=warnings,
            original=openclip_original.original(checkpoint, architecture, stated.preprocess, parts, store, options),
            origins=origins | _text_origins(architecture),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = OpenClipArchitecture.from_config(architecture)
        encoders = build_encoders(parsed)
        is_custom = parsed.custom_text or parsed.text_cfg.hf_model_name
        table = weight_table(parsed, encoders, "text." if is_custom else "")
        return published_tensors(encoders, table, dtype="float32")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"model_cfg": dict(architecture)}


def _is_text_key(key: str) -> bool:
    return key in TEXT_MARKS or key.startswith("text.transformer.")


def _is_no_clip_key(key: str) -> bool:
    """Whether no model has the key that OpenAI's key names describe."""
    text = key.removeprefix("text.")
    of_transformers = text != key and text.startswith("transformer.") and not text.startswith("transformer.resblocks.")
    return key.startswith("visual.trunk.") or text == "text_projection.weight" or of_transformers


@dataclass(frozen=True)
class _Stated:
    """What a config, or open_clip under a name that the user tells, says of weights."""

    architecture: OpenClipArchitecture
    preprocess: Any
    where: str = FILE
    warnings: tuple[str, ...] = ()

    def image(self, checkpoint: Checkpoint) -> Prepared:
        """How images are prepared."""
        edge = self.architecture.vision_cfg.image_edge
        return open_clip_image(self.preprocess, edge, self.where, processor_files(checkpoint))


def stated_by(checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> _Stated:
    """What the config says, or open_clip of the model that the option names.

    Raises:
        InputError: the config describes a model that is not computed here, or there is none.
        UsageError: the options say what the checkpoint says itself, or open_clip has no such model.
    """
    told = options.family_options.get(_MODEL_OPTION)
    config = checkpoint.side_configs.get(FILE)
    if config is None and checkpoint.format == "random":
        # What `published_config` made.
        config = checkpoint.config
    if config is None:
        return _told(checkpoint, None if told is None else str(told))
    if told is not None:
        raise UsageError(
            "this checkpoint says itself which model it is",
            where=checkpoint.source,
            expected=f"no --set {_MODEL_OPTION}",
            got=f"{told}, beside {FILE}",
            fix="leave the option out",
        )
    return _Stated(read_architecture(config, FILE), config.get("preprocess_cfg") or {})


def _told(checkpoint: Checkpoint, name: str | None) -> _Stated:
    if name is None:
        raise InputError(
            f"nothing says which model of open_clip these weights are: there is no {FILE} beside them",
            where=checkpoint.source,
            expected=f"{FILE} beside the weights, or the name of open_clip's model",
            got="key names of MobileCLIP" if is_apple(checkpoint) else "key names of open_clip",
            fix=f"put the model's {FILE} beside the weights, or export with --set {_MODEL_OPTION}=NAME, "
            f"such as {'MobileCLIP-S1' if is_apple(checkpoint) else 'ViT-B-16-SigLIP'}",
        )
    from open_clip import get_model_config
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    found = get_model_config(name)
    if found is None:
        raise UsageError(
            "open_clip has no model of this name",
            where=f"--set {_MODEL_OPTION}",
            expected="a name of open_clip.list_models()",
            got=name,
        )
    keys = ("mean", "std", "interpolation", "resize_mode")
    weights = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    ways = {tuple(published.get(key) for key in keys) for published in weights}
    where = f"open_clip's {name}"
    if len(ways) == 1:
        preprocess = dict(zip(keys, ways.pop(), strict=True))
        how = f"as open_clip does for the weights of {name} that it knows"
    else:
        preprocess, how = {}, "as open_clip does by default"
    warning = f"the weights do not say how images are prepared: it is done {how}. Their {FILE} beside them would say it"
    return _Stated(read_architecture({"model_cfg": found}, where), preprocess, where, (warning,))


def _table(architecture: OpenClipArchitecture, encoders: OpenClipEncoders, checkpoint: Checkpoint) -> dict[str, Target]:
    return weight_table(architecture, encoders, text_prefix(checkpoint.tensors))


def _parts(
    architecture: OpenClipArchitecture,
    encoders: OpenClipEncoders,
    image_size: int | None = None,
    *,
    dynamic_image_size: bool = False,
) -> Iterator[Part]:
    config = architecture.vision_cfg
    patch = 1 if config.timm_model_name or isinstance(config.layers, tuple) else config.patch_edge
    shape, axes = image_shape(image_size or config.image_edge, patch, dynamic_image_size)
    vision = Signature(
        inputs=(TensorSpec("pixel_values", "float32", shape),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH, *axes),
    )
    yield Part("vision", encoders.vision, vision, ImageExamples(vision))
    context = architecture.text_cfg.context_length
    filled = sees_padding(architecture)
    text = Signature(
        inputs=(TensorSpec("input_ids", "int64", ("batch", context if filled else "sequence")),),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH,) if filled else (BATCH, Axis("sequence", 1, context)),
    )
    yield Part("text", encoders.text, text, _TextExamples(architecture, context))


class _TextExamples:
    """Random ids with an end at a random position, another in each row, and padding after it.

    The first row's comes late enough for the vocabulary's edges to stand before it.
    """

    def __init__(self, architecture: OpenClipArchitecture, context: int) -> None:
        config = architecture.text_cfg
        self.vocab_size, self.context, self.pad_id = text_vocab_size(architecture), context, text_pad_id(architecture)
        self.end_id = config.eos_id if config.pool_type == "eos" else self.vocab_size - 1

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        rows, tokens = sizes["batch"], sizes.get("sequence", self.context)
        ids = random_ids(rng, (rows, tokens), self.vocab_size, without=self.end_id)
        ends = rng.integers(0, tokens, rows)
        ends[0] = max(ends[0], min(EDGES, tokens - 1))
        for row, end in zip(ids, ends, strict=True):
            row[end] = self.end_id
            row[end + 1 :] = self.pad_id
        return {"input_ids": ids}


def _embed_task(encoders: OpenClipEncoders) -> EmbedSpec:
    image, text = EncoderSpec("vision", "image_embeds"), EncoderSpec("text", "text_embeds")
    scale = float(encoders.logit_scale)
    if hasattr(encoders, "logit_bias"):
        return EmbedSpec(image, text, ScoreSpec("sigmoid", scale, float(encoders.logit_bias)))
    return EmbedSpec(image, text, ScoreSpec("softmax", scale))


def _notes(architecture: OpenClipArchitecture) -> Iterator[str]:
    vision, text = architecture.vision_cfg, architecture.text_cfg
    if vision.timm_model_name:
        yield f"the image encoder is timm's {vision.timm_model_name}, in timm's own module"
    if text.hf_model_name:
        yield f"the text encoder is transformers' {text.hf_model_name}"
    elif sees_padding(architecture):
        yield f"the text encoder sees its padding: texts are always filled up to {text.context_length} tokens"
    if architecture.quick_gelu:
        yield "QuickGELU (x · sigmoid(1.702 x)), not GELU: a wrong one changes every embedding"
    if architecture.init_logit_bias is not None:
        yield "scores are sigmoid(scale · cosine + bias) of each text by itself, not a softmax over texts"


def _text_spec(architecture: OpenClipArchitecture) -> TextSpec:
    config, vocab_size = architecture.text_cfg, text_vocab_size(architecture)
    cleaning: TextCleaning = config.clean if config.hf_tokenizer_name else "open_clip"
    return TextSpec(
        context_length=config.context_length,
        vocab_size=vocab_size,
        end_token_id=config.eos_id if config.pool_type == "eos" else min(_END_ID, vocab_size - 1),
        # A tokenizer of transformers says itself what it fills with.
        pad_token_id=min(text_pad_id(architecture), vocab_size - 1) if config.hf_tokenizer_name else 0,
        cleaning=cleaning,
        pooling=_pooling(architecture),
        padding="context" if sees_padding(architecture) else "longest",
    )


def _pooling(architecture: OpenClipArchitecture) -> TextPooling:
    config = architecture.text_cfg
    if (encoder := hf_encoder(architecture)) is not None:
        return "mean" if pooler_of(encoder, architecture) == "mean_pooler" else "first_token"
    if config.pool_type == "argmax":
        # The end token of open_clip's own tokenizer has the highest id.
        return "highest_id" if config.hf_tokenizer_name else "end_token"
    named: dict[str, TextPooling] = {"eos": "end_token", "first": "first_token", "last": "last_token"}
    return named[config.pool_type]


def _text_origins(architecture: OpenClipArchitecture) -> Origins:
    config = architecture.text_cfg
    section = f"{FILE}: model_cfg.text_cfg"
    tokenizer = "open_clip's HFTokenizer" if config.hf_tokenizer_name else "open_clip's SimpleTokenizer"
    return Origins(
        {
            "text.context_length": f"{section}.context_length",
            "text.vocab_size": f"{section}.{'hf_model_name' if config.hf_model_name else 'vocab_size'}",
            "text.end_token_id": f"{section}.eos_id" if config.pool_type == "eos" else tokenizer,
            "text.pad_token_id": tokenizer,
            "text.cleaning": f"{section}.tokenizer_kwargs" if config.tokenizer_kwargs else tokenizer,
            "text.padding": f"{section}: hf_model_name, no_causal_mask and pool_type",
            "text.case": tokenizer,
            "text.pooling": f"{section}.{'hf_pooler_type' if config.hf_model_name else 'pool_type'}",
        }
    )
