"""SigLIP and SigLIP 2: an image encoder with attention pooling, a text encoder without a mask.

Ports of transformers 5.23 models/siglip and models/siglip2, valid for Hugging Face directories of `SiglipModel`, of
`Siglip2Model` (NaFlex), and of their towers alone, whose embedding is `pooler_output`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vlm_export.errors import UsageError
from vlm_export.family import (
    DEFAULT_BUILD,
    Array,
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
    image_size_origin,
    transformers_image,
    transformers_patches,
    with_chosen_size,
)
from vlm_export.models.reading.images import ImageExamples, apply_image_size, config_of_size, image_shape
from vlm_export.models.reading.token_ids import random_ids
from vlm_export.models.reading.towers import TOWERS, section_name
from vlm_export.models.reading.transformers_model import reference_from_encoder, transformers_model
from vlm_export.models.reading.weights import load_weights, published_score, published_tensors
from vlm_export.models.siglip.architecture import (
    ACTIVATION_NAMES,
    NaflexChoices,
    NaflexSizes,
    SiglipArchitecture,
    TextSizes,
    VisionSizes,
    architecture_of,
    is_naflex,
    stated_text,
    stated_vision,
)
from vlm_export.models.siglip.encoders import SiglipEncoders, build_encoders
from vlm_export.models.siglip.naflex import NaflexExamples, check_patches, naflex_signature
from vlm_export.models.siglip.weights import (
    ROOTS,
    TEXT_MARK,
    VISION_MARK,
    tower_of_plain_names,
    weight_table,
    with_tower_names,
)
from vlm_export.original import Original, TransformersOriginal
from vlm_export.specs import ImageSpec, Origins, PatchSpec, TextSpec
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
        return _is_siglip(checkpoint) and not is_naflex(checkpoint)

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
        image, origins = _image(published, architecture, checkpoint) or (None, Origins())
        if isinstance(image, PatchSpec):
            check_patches(image, NaflexChoices.from_config(options.family_options))
        parts = tuple(_parts(architecture, encoders, options))
        task = _embed_task(architecture, encoders)
        classes = TransformersOriginal(architecture.model_type, f"{_CLASSES[architecture.model_type]}ImageProcessor")
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=config_of_size(
                checkpoint.config or _config_from_architecture(architecture),
                architecture.vision.image_size if isinstance(architecture.vision, VisionSizes) else None,
            ),
            tasks=(task,),
            dropped_keys=dropped,
            references={part.name: partial(_reference, checkpoint, published, part) for part in parts},
            reference_name=f"transformers {_class_name(architecture)}",
            original=Original(classes, classes, score=published_score(checkpoint)),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = SiglipArchitecture.from_config(architecture)
        return published_tensors(build_encoders(parsed), weight_table(parsed), dtype="float32")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return _config_from_architecture(SiglipArchitecture.from_config(architecture))


class Siglip2Family(SiglipFamily):
    """SigLIP 2's NaFlex, whose image encoder takes patches of images of any shape."""

    name = "siglip2"
    options: type[Spec] = NaflexChoices
    config_types: Mapping[str, tuple[str, ...]] = {
        "siglip2": ("Siglip2Model",),
        "siglip2_vision_model": ("Siglip2VisionModel",),
        "siglip2_text_model": ("Siglip2TextModel",),
    }

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return _is_siglip(checkpoint) and is_naflex(checkpoint)


def _is_siglip(checkpoint: Checkpoint) -> bool:
    keys = checkpoint.tensors
    return VISION_MARK in keys or TEXT_MARK in keys or tower_of_plain_names(checkpoint) is not None


def _parts(
    architecture: SiglipArchitecture, encoders: SiglipEncoders, options: BuildOptions = DEFAULT_BUILD
) -> Iterator[Part]:
    """The towers that are there, in the order in which they are exported; one alone has transformers' output name."""
    names = _output_names(architecture)
    vision, output = architecture.vision, TensorSpec(names["vision"], "float32", ("batch", architecture.embed_dim))
    if isinstance(vision, NaflexSizes):
        signature = naflex_signature(vision, output, NaflexChoices.from_config(options.family_options).fixed_patches)
        yield Part("vision", encoders.vision, signature, NaflexExamples(signature))
    elif vision is not None:
        shape, axes = image_shape(vision.image_size, vision.patch_size, options.dynamic_image_size)
        signature = Signature((TensorSpec("pixel_values", "float32", shape),), (output,), (BATCH, *axes))
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
    return {"vision": "image_embeds", "text": "text_embeds"} if both else dict.fromkeys(TOWERS, "pooler_output")


# What the names of transformers' classes begin with.
_CLASSES = {"siglip": "Siglip", "siglip2": "Siglip2"}


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


def _class_name(architecture: SiglipArchitecture) -> str:
    """transformers' class of such a checkpoint."""
    tower = "Vision" if architecture.text is None else "" if architecture.vision is not None else "Text"
    return f"{_CLASSES[architecture.model_type]}{tower}Model"


def _notes(architecture: SiglipArchitecture) -> Iterator[str]:
    if (text := architecture.text) is not None:
        yield (
            f"texts are filled up to {text.context_length} tokens without a mask, and the last one is pooled: padding "
            "is part of what the model reads"
        )
    if (vision := architecture.vision) is not None:
        yield "a learned query pools the image's patches by attention"
    if isinstance(vision, VisionSizes):
        yield f"images are {vision.image_size} pixels square; --image-size and --dynamic-image-size are taken"
    if isinstance(vision, NaflexSizes):
        yield "images of any shape share a batch, each with positions of its own; --set fixed_patches=L fixes L patches"
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
    if isinstance(architecture.vision, NaflexSizes):
        if options.image_size is not None or options.dynamic_image_size:
            raise UsageError("this image encoder takes images of any shape", fix="leave the size options out")
        return architecture
    image_size = apply_image_size(encoders.vision, architecture.vision.image_size, options)
    return replace(architecture, vision=replace(architecture.vision, image_size=image_size))


def _image(
    published: SiglipArchitecture, architecture: SiglipArchitecture, checkpoint: Checkpoint
) -> tuple[ImageSpec | PatchSpec, Origins] | None:
    """For images of `architecture`'s size; the checkpoint states the published one. None without an image encoder."""
    if isinstance(published.vision, NaflexSizes):
        return transformers_patches(checkpoint, published.vision.patch_size)
    if published.vision is None or not isinstance(architecture.vision, VisionSizes):
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
    config = _config_from_architecture(architecture)
    # A class of one tower has no prefix before its keys.
    model = transformers_model(checkpoint, _class_name(architecture), config, renamed=(f"{part.name}_model.", ""))
    vision = architecture.vision
    return reference_from_encoder(model, part, vision.image_size if isinstance(vision, VisionSizes) else None)
