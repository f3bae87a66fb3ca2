"""CLIP: image encoder (ViT or ModifiedResNet) and causal text encoder, each with its projection.

Ports of openai/CLIP model.py (d05afc4) and transformers 5.23 models/clip/modeling_clip.py, valid for the nine
OpenAI downloads, state dicts with the same keys (fine-tuned, or of open_clip: `choices.py`), and Hugging Face
`CLIPModel` directories.
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
    Part,
    Reference,
    StoredTensorInfo,
    WeightStore,
    outlines,
    reference_from_module,
)
from vlm_export.models.clip import architecture as clip_architecture
from vlm_export.models.clip import choices as clip_choices
from vlm_export.models.clip import original as clip_original
from vlm_export.models.clip import weights as clip_weights
from vlm_export.models.clip.architecture import (
    CLIP_NAMES,
    ClipArchitecture,
    LibraryNames,
    ResNetSizes,
    TextSizes,
    VitSizes,
    stated_in,
)
from vlm_export.models.clip.encoders import ClipEncoders, build_encoders
from vlm_export.models.clip.hub_config import class_name, config_from_architecture
from vlm_export.models.reading.image_processor import (
    image_size_origin,
    processor_files,
    same_origin,
    transformers_image,
    with_chosen_size,
)
from vlm_export.models.reading.images import (
    IMAGE_MEAN,
    IMAGE_STD,
    ImageExamples,
    apply_image_size,
    config_of_size,
    image_shape,
)
from vlm_export.models.reading.token_ids import EDGES, random_ids
from vlm_export.models.reading.transformers_model import reference_from_encoder, transformers_model
from vlm_export.models.reading.weights import Target, load_weights, published_tensors
from vlm_export.specs import ImageSpec, Origins, TextSpec, torchvision_image_spec
from vlm_export.specs.codec import Spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

BATCH = Axis("batch")
_HF_WORDS = "text_model.embeddings.token_embedding.weight"


class ClipFamily:
    """OpenAI's key names and Hugging Face's."""

    name = "clip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = clip_architecture.ClipChoices
    marks: tuple[str, ...] = ("visual.conv1.weight", "vision_model.pre_layrnorm.weight", _HF_WORDS)
    roots: tuple[str, ...] = (*clip_weights.OPENAI_ROOTS, *clip_weights.HF_ROOTS)
    library = CLIP_NAMES
    config_types: Mapping[str, tuple[str, ...]] = {
        "clip": ("CLIPModel",),
        "clip_vision_model": ("CLIPVisionModelWithProjection",),
        "clip_text_model": ("CLIPTextModelWithProjection",),
    }

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        words = ("token_embedding.weight", clip_choices.TEXT_MARK)
        openai = "visual.conv1.weight" in keys and any(key in keys for key in words)
        vision = "visual_projection.weight" in keys and "vision_model.pre_layrnorm.weight" in keys
        text = "text_projection.weight" in keys and {_HF_WORDS, "text_model.final_layer_norm.weight"} <= set(keys)
        return openai or vision or (text and not any(key.startswith("vision_model.") for key in keys))

    def describe(self, checkpoint: Checkpoint) -> Description:
        checkpoint = clip_choices.with_plain_text_names(checkpoint)
        clip_choices.refuse_sigmoid(checkpoint)
        is_huggingface = _is_huggingface(checkpoint)
        architecture = (
            self._architecture(checkpoint) if is_huggingface else clip_choices.described_architecture(checkpoint)
        )
        parts = outlines(_parts(architecture, build_encoders(architecture)))
        warnings = clip_choices.assumptions(checkpoint, architecture)
        image, origins = _image(architecture, architecture, checkpoint)
        return Description(
            architecture.to_json(),
            parts,
            tuple(_notes(architecture)),
            warnings,
            image=image,
            text=_text_spec(architecture, checkpoint),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        checkpoint = clip_choices.with_plain_text_names(checkpoint)
        architecture = self._architecture(checkpoint, options)
        encoders = build_encoders(architecture)
        dropped = load_weights(encoders, checkpoint, _table(architecture), store)
        published, architecture = architecture, _resized(architecture, encoders, options)
        parts = tuple(_parts(architecture, encoders, dynamic_image_size=options.dynamic_image_size))
        image, origins = _image(published, architecture, checkpoint)
        huggingface = architecture.key_names == "huggingface"
        build_reference = (
            partial(transformers_reference, checkpoint, published, self.library)
            if huggingface
            else reference_from_module
        )
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture, checkpoint),
            hub_config=config_of_size(
                (checkpoint.config if huggingface else None) or config_from_architecture(architecture, self.library),
                None if architecture.vision is None else architecture.vision.image_size,
            ),
            tasks=(_embed_task(architecture, encoders),),
            dropped_keys=dropped,
            references={part.name: partial(build_reference, part) for part in parts},
            reference_name=f"transformers {class_name(architecture, self.library)}"
            if huggingface
            else "unpatched eager module",
            warnings=clip_choices.assumptions(checkpoint, architecture, options),
            original=clip_original.original(checkpoint, published, parts, store, options, self.library.model_type),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = ClipArchitecture.from_config(architecture)
        return published_tensors(build_encoders(parsed), _table(parsed), dtype="float16")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        parsed = ClipArchitecture.from_config(architecture)
        return config_from_architecture(parsed, self.library) if parsed.key_names == "huggingface" else None

    def _architecture(self, checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> ClipArchitecture:
        clip_choices.refuse_sigmoid(checkpoint)
        if _is_huggingface(checkpoint):
            clip_choices.refuse_choices(options, checkpoint)
            return clip_architecture.architecture_from_huggingface(checkpoint, self.library)
        return clip_choices.clip_architecture(checkpoint, options)


def _is_huggingface(checkpoint: Checkpoint) -> bool:
    # open_clip's text encoder with a bias behind its projection has a `text_projection.weight` of its own.
    keys = checkpoint.tensors
    return any(key in keys for key in ("visual_projection.weight", "text_projection.weight")) and (
        "visual.conv1.weight" not in keys
    )


def _parts(
    architecture: ClipArchitecture, encoders: ClipEncoders, *, dynamic_image_size: bool = False
) -> Iterator[Part]:
    """The towers that are there, in the order in which they are exported."""
    if architecture.vision is not None:
        vision = vision_signature(architecture, architecture.vision, dynamic_image_size)
        yield Part("vision", encoders.vision, vision, ImageExamples(vision))
    if architecture.text is not None:
        text = text_signature(architecture, architecture.text)
        yield Part("text", encoders.text, text, _TextExamples(architecture.text))


def _embed_task(architecture: ClipArchitecture, encoders: ClipEncoders) -> EmbedSpec:
    """A tower alone has no score: it compares nothing."""
    image = None if architecture.vision is None else EncoderSpec("vision", "image_embeds")
    text = None if architecture.text is None else EncoderSpec("text", "text_embeds")
    has_both = image is not None and text is not None
    return EmbedSpec(image, text, ScoreSpec("softmax", float(encoders.logit_scale)) if has_both else None)


def _table(architecture: ClipArchitecture) -> dict[str, Target]:
    vision, text = architecture.vision, architecture.text
    text_layers = 0 if text is None else text.layers
    if isinstance(vision, ResNetSizes):
        return clip_weights.openai_resnet_table(vision.stages, text_layers)
    vision_layers = 0 if vision is None else vision.layers
    if architecture.key_names == "openai":
        return clip_weights.openai_vit_table(vision_layers, text_layers)
    table = clip_weights.huggingface_table(vision_layers, text_layers)
    if vision is None or text is None:
        return clip_weights.tower_table(table, "text" if vision is None else "vision")
    return table


def _notes(architecture: ClipArchitecture) -> Iterator[str]:
    if (text := architecture.text) is not None:
        where = "the highest token id" if text.pooling == "argmax" else f"the first token {text.end_token_id}"
        yield f"text is pooled at {where}; the causal mask is cut to T, so T tokens cost T (1 to {text.context_length})"
    if architecture.activation == "quick_gelu":
        yield "QuickGELU (x · sigmoid(1.702 x)), not the GELU of later CLIP models: a wrong one changes every embedding"
    if isinstance(architecture.vision, ResNetSizes):
        yield "ModifiedResNet with attention pooling: no transformers model has it"
    if architecture.vision is not None:
        size = architecture.vision.image_size
        yield f"images are {size} pixels square; a ViT takes --image-size and --dynamic-image-size"
    if architecture.vision is None or architecture.text is None:
        other = "image" if architecture.vision is None else "text"
        yield f"this is one tower of a CLIP: the checkpoint has no {other} encoder"


def _resized(architecture: ClipArchitecture, encoders: ClipEncoders, options: BuildOptions) -> ClipArchitecture:
    """Applies the options to the image encoder; returns the architecture with the size that it has now.

    Raises:
        UsageError: the options are about an image encoder, and there is none.
    """
    if architecture.vision is None:
        if options.image_size is not None or options.dynamic_image_size:
            raise UsageError("this checkpoint has no image encoder", fix="leave the size options out")
        return architecture
    image_size = apply_image_size(encoders.vision, architecture.vision.image_size, options)
    return replace(architecture, vision=replace(architecture.vision, image_size=image_size))


def vision_signature(
    architecture: ClipArchitecture, vision: VitSizes | ResNetSizes, dynamic_image_size: bool
) -> Signature:
    """Pixels in, embeddings out."""
    patch_size = vision.patch_size if isinstance(vision, VitSizes) else 1
    shape, axes = image_shape(vision.image_size, patch_size, dynamic_image_size)
    return Signature(
        inputs=(TensorSpec("pixel_values", "float32", shape),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH, *axes),
    )


def text_signature(architecture: ClipArchitecture, text: TextSizes) -> Signature:
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH, Axis("sequence", 1, text.context_length)),
    )


class _TextExamples:
    """Random ids with end-of-text at a random position (a different one in each row) and padding after it.

    The first row's comes late enough for the vocabulary's edges to stand before it.
    """

    def __init__(self, sizes: TextSizes) -> None:
        self.sizes = sizes

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        rows, tokens = sizes["batch"], sizes["sequence"]
        end_id = self.sizes.end_token_id
        ids = random_ids(rng, (rows, tokens), self.sizes.vocab_size, without=end_id)
        ends = rng.integers(0, tokens, rows)
        ends[0] = max(ends[0], min(EDGES, tokens - 1))
        for row, end in zip(ids, ends, strict=True):
            row[end] = end_id
            row[end + 1 :] = 0
        return {"input_ids": ids}


def _image(
    published: ClipArchitecture, architecture: ClipArchitecture, checkpoint: Checkpoint
) -> tuple[ImageSpec | None, Origins]:
    """For images of `architecture`'s size; the checkpoint states the published one. None without an image encoder."""
    if published.vision is None or architecture.vision is None:
        return None, Origins()
    size = published.vision.image_size
    if architecture.key_names == "openai" and not processor_files(checkpoint):
        spec = torchvision_image_spec(size, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD)
        origins = {**same_origin(spec, "openai/CLIP clip.py"), "image.size_pixels": "the image encoder's weights"}
        return with_chosen_size((spec, Origins(origins)), architecture.vision.image_size)
    prepared = transformers_image(checkpoint, "CLIPImageProcessor", size, image_size_origin(checkpoint))
    return with_chosen_size(prepared, architecture.vision.image_size)


def _text_spec(architecture: ClipArchitecture, checkpoint: Checkpoint) -> TextSpec | None:
    text = architecture.text
    if text is None:
        return None
    openai = architecture.key_names == "openai"
    return TextSpec(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        end_token_id=text.end_token_id,
        # OpenAI fills with id 0, transformers with end-of-text; neither is visible to the pooled token.
        pad_token_id=0 if openai else text.end_token_id,
        cleaning="openai" if openai else "none",
        # OpenAI's own models end texts with the last id, so that the two are one.
        pooling="highest_id" if text.pooling == "argmax" and not openai else "end_token",
    )


def _text_origins(architecture: ClipArchitecture, checkpoint: Checkpoint) -> Origins:
    """What states the fields of the TextSpec, before a tokenizer has its say."""
    if architecture.text is None:
        return Origins()
    if architecture.key_names == "openai":
        tokenizer = "openai/CLIP's SimpleTokenizer"
        return Origins(
            {
                "text.context_length": "shape of positional_embedding",
                "text.vocab_size": "shape of token_embedding.weight",
                "text.end_token_id": f"{tokenizer}: the vocabulary's last id",
                "text.pad_token_id": "openai/CLIP: zeros",
                "text.cleaning": tokenizer,
                "text.padding": "the model does not see padding",
                "text.case": tokenizer,
            }
        )
    end = stated_in(checkpoint, "text", "eos_token_id")
    return Origins(
        {
            "text.context_length": "shape of text_model.embeddings.position_embedding.weight",
            "text.vocab_size": "shape of text_model.embeddings.token_embedding.weight",
            "text.end_token_id": end,
            "text.pad_token_id": "end-of-text, which the model does not see behind the first",
            "text.cleaning": "transformers: the tokenizer alone",
            "text.padding": "the model does not see padding",
            "text.case": "default of the tokenizer's class",
            "text.pooling": end,
        }
    )


def transformers_reference(
    checkpoint: Checkpoint, architecture: ClipArchitecture, library: LibraryNames, part: Part
) -> Reference:
    stated = config_from_architecture(architecture, library)
    # No ids that only generation reads, which transformers would compare with the vocabulary.
    if architecture.text is not None:
        stated.get("text_config", stated).update({"bos_token_id": None, "pad_token_id": None})
    model = transformers_model(checkpoint, class_name(architecture, library), stated)
    return reference_from_encoder(model, part, None if architecture.vision is None else architecture.vision.image_size)
