"""SigLIP and SigLIP 2 of a fixed resolution: an image encoder with attention pooling, a text encoder without a mask.

Port of transformers 5.23 models/siglip/modeling_siglip.py, valid for Hugging Face directories of `SiglipModel` and of
its towers alone, whose embedding is `pooler_output`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from vlm_export.errors import UsageError
from vlm_export.family import (
    DEFAULT_BUILD,
    Array,
    Arrays,
    BuildOptions,
    Checkpoint,
    Description,
    Model,
    NoOptions,
    Part,
    Reference,
    StoredTensorInfo,
    WeightStore,
    outlines,
)
from vlm_export.models.reading.image_processor import (
    Prepared,
    image_size_origin,
    transformers_image,
    with_chosen_size,
)
from vlm_export.models.reading.images import ImageExamples, apply_image_size, config_of_size, image_shape
from vlm_export.models.reading.token_ids import random_ids
from vlm_export.models.reading.weights import load_weights, published_tensors
from vlm_export.models.siglip.architecture import (
    ACTIVATION_NAMES,
    SiglipArchitecture,
    TextSizes,
    architecture_of,
    section_name,
    stated_text,
    stated_vision,
)
from vlm_export.models.siglip.encoders import SiglipEncoders, build_encoders
from vlm_export.models.siglip.weights import (
    ROOTS,
    TEXT_MARK,
    VISION_MARK,
    tower_of_plain_names,
    weight_table,
    with_tower_names,
)
from vlm_export.original import Original, TransformersOriginal
from vlm_export.specs import Origins, TextSpec
from vlm_export.specs.codec import Spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

BATCH = Axis("batch")


class SiglipFamily:
    """Both towers, or one of them."""

    name = "siglip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = (VISION_MARK, TEXT_MARK)
    roots: tuple[str, ...] = ROOTS
    config_types: Mapping[str, tuple[str, ...]] = {
        "siglip": ("SiglipModel",),
        "siglip_vision_model": ("SiglipVisionModel",),
        "siglip_text_model": ("SiglipTextModel",),
    }

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        return VISION_MARK in keys or TEXT_MARK in keys or tower_of_plain_names(checkpoint) is not None

    def describe(self, checkpoint: Checkpoint) -> Description:
        checkpoint = with_tower_names(checkpoint)
        architecture = architecture_of(checkpoint)
        prepared = _image(architecture, architecture, checkpoint)
        image, origins = prepared or (None, Origins())
        return Description(
            architecture.to_json(),
            outlines(_parts(architecture, build_encoders(architecture))),
            tuple(_notes(architecture)),
            image=image,
            text=_text_spec(architecture),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        checkpoint = with_tower_names(checkpoint)
        published = architecture_of(checkpoint)
        encoders = build_encoders(published)
        dropped = load_weights(encoders, checkpoint, weight_table(published), store)
        architecture = _resized(published, encoders, options)
        parts = tuple(_parts(architecture, encoders, dynamic_image_size=options.dynamic_image_size))
        image, origins = _image(published, architecture, checkpoint) or (None, Origins())
        task = _embed_task(architecture, encoders)
        classes = TransformersOriginal(architecture.model_type, "SiglipImageProcessor")
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=config_of_size(
                checkpoint.config or _config_from_architecture(architecture),
                None if architecture.vision is None else architecture.vision.image_size,
            ),
            tasks=(task,),
            dropped_keys=dropped,
            references={part.name: partial(_reference, checkpoint, published, part) for part in parts},
            reference_name=f"transformers {_class_name(architecture)}",
            original=Original(classes, classes, score=_score(checkpoint)),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = SiglipArchitecture.from_config(architecture)
        return published_tensors(build_encoders(parsed), weight_table(parsed), dtype="float32")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return _config_from_architecture(SiglipArchitecture.from_config(architecture))


def _parts(
    architecture: SiglipArchitecture, encoders: SiglipEncoders, *, dynamic_image_size: bool = False
) -> Iterator[Part]:
    """The towers that are there, in the order in which they are exported; one alone has transformers' output name."""
    names = _output_names(architecture)
    if (vision := architecture.vision) is not None:
        shape, axes = image_shape(vision.image_size, vision.patch_size, dynamic_image_size)
        signature = Signature(
            inputs=(TensorSpec("pixel_values", "float32", shape),),
            outputs=(TensorSpec(names["vision"], "float32", ("batch", architecture.embed_dim)),),
            axes=(BATCH, *axes),
        )
        yield Part("vision", encoders.vision, signature, ImageExamples(signature))
    if (text := architecture.text) is not None:
        signature = Signature(
            inputs=(TensorSpec("input_ids", "int64", ("batch", text.context_length)),),
            outputs=(TensorSpec(names["text"], "float32", ("batch", architecture.embed_dim)),),
            axes=(BATCH,),
        )
        yield Part("text", encoders.text, signature, partial(_text_examples, text))


def _output_names(architecture: SiglipArchitecture) -> dict[str, str]:
    both = architecture.vision is not None and architecture.text is not None
    return {"vision": "image_embeds", "text": "text_embeds"} if both else dict.fromkeys(_TOWERS, "pooler_output")


_TOWERS = ("vision", "text")


def _text_examples(text: TextSizes, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Random ids with end-of-text at a random position and padding after it, up to the context."""
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, (sizes["batch"], text.context_length), text.vocab_size)
    # The first row stays full, so that its last position is none of padding.
    for row, end in list(zip(ids, rng.integers(0, text.context_length, len(ids)), strict=True))[1:]:
        row[end] = text.end_token_id
        row[end + 1 :] = text.pad_token_id
    return {"input_ids": ids}


def _embed_task(architecture: SiglipArchitecture, encoders: SiglipEncoders) -> EmbedSpec:
    """A tower alone has no score: it compares nothing."""
    names = _output_names(architecture)
    image = None if architecture.vision is None else EncoderSpec("vision", names["vision"])
    text = None if architecture.text is None else EncoderSpec("text", names["text"])
    if image is None or text is None:
        return EmbedSpec(image, text)
    return EmbedSpec(image, text, ScoreSpec("sigmoid", float(encoders.logit_scale), float(encoders.logit_bias)))


def _score(checkpoint: Checkpoint) -> dict[str, float]:
    names = ("logit_scale", "logit_bias")
    return {name: float(checkpoint.read(name).float().reshape(-1)[0]) for name in names if name in checkpoint.tensors}


def _class_name(architecture: SiglipArchitecture) -> str:
    """transformers' class of such a checkpoint."""
    if architecture.text is None:
        return "SiglipVisionModel"
    return "SiglipModel" if architecture.vision is not None else "SiglipTextModel"


def _notes(architecture: SiglipArchitecture) -> Iterator[str]:
    if (text := architecture.text) is not None:
        yield (
            f"texts are filled up to {text.context_length} tokens without a mask, and the last one is pooled: padding "
            "is part of what the model reads"
        )
    if (vision := architecture.vision) is not None:
        yield "a learned query pools the image's patches by attention"
        yield f"images are {vision.image_size} pixels square; --image-size and --dynamic-image-size are taken"
    if architecture.vision is None or architecture.text is None:
        other = "image" if architecture.vision is None else "text"
        yield f"this is one tower of a SigLIP: the checkpoint has no {other} encoder"
    else:
        yield "each pair of image and text is scored by itself, with a sigmoid"


def _resized(architecture: SiglipArchitecture, encoders: SiglipEncoders, options: BuildOptions) -> SiglipArchitecture:
    """Applies the options to the image encoder; UsageError when they are about one that is not there."""
    if architecture.vision is None:
        if options.image_size is not None or options.dynamic_image_size:
            raise UsageError("this checkpoint has no image encoder", fix="leave the size options out")
        return architecture
    image_size = apply_image_size(encoders.vision, architecture.vision.image_size, options)
    return replace(architecture, vision=replace(architecture.vision, image_size=image_size))


def _image(published: SiglipArchitecture, architecture: SiglipArchitecture, checkpoint: Checkpoint) -> Prepared | None:
    """For images of `architecture`'s size; the checkpoint states the published one. None without an image encoder."""
    if published.vision is None or architecture.vision is None:
        return None
    size = published.vision.image_size
    prepared = transformers_image(checkpoint, "SiglipImageProcessor", size, image_size_origin(checkpoint))
    return with_chosen_size(prepared, architecture.vision.image_size)


def _text_spec(architecture: SiglipArchitecture) -> TextSpec | None:
    text = architecture.text
    if text is None:
        return None
    return TextSpec(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        end_token_id=text.end_token_id,
        pad_token_id=text.pad_token_id,
        cleaning="none",
        pooling="last_token",
        padding="context",
    )


def _text_origins(architecture: SiglipArchitecture, checkpoint: Checkpoint) -> Origins:
    """What states the fields of the TextSpec, before a tokenizer has its say."""
    if architecture.text is None:
        return Origins()
    section = section_name(checkpoint, "text")
    place = f"config.json: {section}." if section else "config.json: "
    code = "transformers 5.23, models/siglip"
    return Origins(
        {
            "text.context_length": "shape of text_model.embeddings.position_embedding.weight",
            "text.vocab_size": "shape of text_model.embeddings.token_embedding.weight",
            "text.end_token_id": f"{place}eos_token_id, or 1 where it is outside the vocabulary",
            "text.pad_token_id": f"{place}pad_token_id, or 1 where it is outside the vocabulary",
            "text.cleaning": "transformers: the tokenizer alone",
            "text.padding": f"{code}: trained with padding to the context, without a mask",
            "text.case": "default of SiglipTokenizer",
            "text.pooling": f"{code}: the last position",
        }
    )


def _config_from_architecture(architecture: SiglipArchitecture) -> dict[str, Any]:
    """`config.json` in the form of transformers' configuration classes."""
    text, vision = architecture.text, architecture.vision
    common = {"hidden_act": ACTIVATION_NAMES[architecture.activation], "layer_norm_eps": architecture.eps}
    towers: dict[str, dict[str, Any]] = {}
    if text is not None:
        towers["text"] = {
            **stated_text(text),
            "num_attention_heads": text.heads,
            "projection_size": architecture.embed_dim,
            "bos_token_id": None,
            "eos_token_id": text.end_token_id,
            "pad_token_id": text.pad_token_id,
            **common,
        }
    if vision is not None:
        towers["vision"] = {**stated_vision(vision), "num_attention_heads": vision.heads, "num_channels": 3, **common}
    for tower, stated in towers.items():
        stated["model_type"] = f"{architecture.model_type}_{tower}_model"
    classes = {"architectures": [_class_name(architecture)]}
    if len(towers) == 1:
        return {**next(iter(towers.values())), **classes}
    return {"model_type": architecture.model_type, **classes, **{f"{t}_config": c for t, c in towers.items()}}


def _reference(checkpoint: Checkpoint, architecture: SiglipArchitecture, part: Part) -> Reference:
    import transformers

    # Of checked sizes alone: whatever else the checkpoint's own config states may be made to hurt.
    kind = getattr(transformers, _class_name(architecture))
    config = kind.config_class.from_dict(_config_from_architecture(architecture))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = kind(config).eval()
    both = architecture.vision is not None and architecture.text is not None
    weights = {
        key if both else key.removeprefix(f"{part.name}_model."): checkpoint.read(key).float()
        for key in checkpoint.tensors
        if not key.endswith("position_ids")
    }
    model.load_state_dict(weights, strict=True, assign=True)
    tower = getattr(model, f"{part.name}_model") if both else model
    embeddings = tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    name = part.signature.input_names[0]
    vision = architecture.vision
    is_resized = vision is not None and part.name == "vision" and part.signature.inputs[0].shape[2] != vision.image_size
    other_size = {"interpolate_pos_encoding": True} if is_resized else {}

    def run(inputs: Arrays) -> dict[str, Array]:
        with torch.inference_mode():
            features = tower(**{name: torch.from_numpy(inputs[name])}, **other_size)
        return {part.signature.output_names[0]: features.pooler_output.numpy()}

    return run
