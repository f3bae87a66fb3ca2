"""Chinese-CLIP: CLIP's image encoder (ViT or ModifiedResNet) beside a Chinese BERT that is read at [CLS].

Ports of OFA-Sys/Chinese-CLIP cn_clip/clip (release 1.6.0) and transformers 5.23
models/chinese_clip/modeling_chinese_clip.py, valid for the authors' five downloads and for `ChineseCLIPModel`
directories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from vlm_export.family import (
    DEFAULT_BUILD,
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
    reference_from_module,
)
from vlm_export.models.chineseclip.architecture import (
    CHINESE_CLIP,
    ChineseClipArchitecture,
    LibraryNames,
    architecture_from_checkpoint,
    is_original,
    stated_text,
)
from vlm_export.models.chineseclip.original import original
from vlm_export.models.chineseclip.parts import build_encoders, build_parts
from vlm_export.models.chineseclip.weights import ROOTS, weight_table
from vlm_export.models.clip.architecture import ResNetSizes
from vlm_export.models.clip.hub_config import hub_tower_config
from vlm_export.models.reading.image_processor import (
    Prepared,
    image_size_origin,
    processor_files,
    same_origin,
    transformers_image,
    with_chosen_size,
)
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD, apply_image_size, config_of_size
from vlm_export.models.reading.transformers_model import reference_from_encoder, transformers_model
from vlm_export.models.reading.weights import load_weights, published_tensors
from vlm_export.specs import Origins, TextSpec, torchvision_image_spec
from vlm_export.specs.codec import Spec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec


class ChineseClipFamily:
    """The authors' key names and transformers'."""

    name = "chineseclip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = ("visual.conv1.weight", "vision_model.pre_layrnorm.weight")
    roots: tuple[str, ...] = ROOTS
    library = CHINESE_CLIP
    config_types: Mapping[str, tuple[str, ...]] = {"chinese_clip": ("ChineseCLIPModel",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        images, texts = self.marks, ("bert.{}", "text_model.{}")
        words = [key.format("embeddings.word_embeddings.weight") for key in texts]
        return any({mark, word} <= set(checkpoint.tensors) for mark, word in zip(images, words, strict=True))

    def with_published_names(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the keys that its publisher gave them."""
        return checkpoint

    def describe(self, checkpoint: Checkpoint) -> Description:
        checkpoint = self.with_published_names(checkpoint)
        architecture = architecture_from_checkpoint(checkpoint, self.library)
        image, origins = _image(architecture, architecture.vision.image_size, checkpoint, self.library)
        return Description(
            architecture.to_json(),
            outlines(build_parts(architecture, build_encoders(architecture))),
            tuple(_notes(architecture, self.library)),
            image=image,
            text=_text_spec(architecture, self.library),
            origins=origins | _text_origins(architecture, checkpoint, self.library),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        checkpoint = self.with_published_names(checkpoint)
        published = architecture_from_checkpoint(checkpoint, self.library)
        encoders = build_encoders(published)
        dropped = load_weights(encoders, checkpoint, weight_table(published, self.library), store)
        image_size = apply_image_size(encoders.vision, published.vision.image_size, options)
        architecture = replace(published, vision=replace(published.vision, image_size=image_size))
        parts = tuple(build_parts(architecture, encoders, dynamic_image_size=options.dynamic_image_size))
        image, origins = _image(published, image_size, checkpoint, self.library)
        huggingface = architecture.key_names == "huggingface"
        build_reference = (
            partial(_reference, checkpoint, published, self.library) if huggingface else reference_from_module
        )
        stated = checkpoint.config if huggingface else None
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture, self.library),
            hub_config=config_of_size(stated or _config_from_architecture(architecture, self.library), image_size),
            tasks=(
                EmbedSpec(
                    EncoderSpec("vision", "image_embeds"),
                    EncoderSpec("text", "text_embeds"),
                    ScoreSpec("softmax", float(encoders.logit_scale)),
                ),
            ),
            dropped_keys=dropped,
            references={part.name: partial(build_reference, part) for part in parts},
            reference_name=f"transformers {self.library.class_name}" if huggingface else "unpatched eager module",
            original=original(checkpoint, published, parts, store, options, self.library),
            origins=origins | _text_origins(architecture, checkpoint, self.library),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = ChineseClipArchitecture.from_config(architecture)
        dtype = "float32" if parsed.key_names == "huggingface" else "float16"
        return published_tensors(build_encoders(parsed), weight_table(parsed, self.library), dtype)

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        parsed = ChineseClipArchitecture.from_config(architecture)
        return _config_from_architecture(parsed, self.library) if parsed.key_names == "huggingface" else None


def _notes(architecture: ChineseClipArchitecture, library: LibraryNames) -> Iterator[str]:
    yield f"text is read at its first token; texts have at most {architecture.context_length} tokens"
    yield f"the processor files say how images are prepared; without them it is as {library.image_class} does it"
    if isinstance(architecture.vision, ResNetSizes):
        yield "ModifiedResNet with attention pooling: no transformers model has it"


def _image(
    architecture: ChineseClipArchitecture, image_size: int, checkpoint: Checkpoint, library: LibraryNames
) -> Prepared:
    """For images of `image_size`; the checkpoint states its own architecture's."""
    published = architecture.vision.image_size
    if not is_original(checkpoint) or processor_files(checkpoint):
        origin = image_size_origin(checkpoint)
        return with_chosen_size(transformers_image(checkpoint, library.image_class, published, origin), image_size)
    spec = torchvision_image_spec(published, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD, "stretch")
    origins = {
        **same_origin(spec, "OFA-Sys/Chinese-CLIP cn_clip/clip/utils.py"),
        "image.size_pixels": "the image encoder's weights",
    }
    return with_chosen_size((spec, Origins(origins)), image_size)


def _text_spec(architecture: ChineseClipArchitecture, library: LibraryNames) -> TextSpec:
    rows = architecture.text.vocab_size
    return TextSpec(
        context_length=architecture.context_length,
        vocab_size=rows,
        end_token_id=min(library.end_token_id, rows - 1),
        pad_token_id=library.pad_token_id,
        cleaning="none",
        pooling="first_token",
    )


def _text_origins(architecture: ChineseClipArchitecture, checkpoint: Checkpoint, library: LibraryNames) -> Origins:
    """What states the fields of the TextSpec, before a tokenizer has its say."""
    original = architecture.key_names == "original"
    return Origins(
        {
            "text.context_length": "cn_clip: tokenize" if original else "rows of the position embedding",
            "text.vocab_size": "rows of the word embedding",
            "text.end_token_id": library.vocabulary,
            "text.pad_token_id": library.vocabulary,
            "text.cleaning": "the tokenizer alone",
            "text.padding": "the model does not see padding",
            "text.case": "default of the tokenizer's class",
            "text.pooling": f"{library.title}: the first token",
        }
    )


def _config_from_architecture(architecture: ChineseClipArchitecture, library: LibraryNames) -> dict[str, Any]:
    """`config.json` in transformers' form."""
    text = architecture.text
    return {
        "model_type": library.model_type,
        "architectures": [library.class_name],
        "projection_dim": architecture.embed_dim,
        "text_config": {
            "model_type": f"{library.model_type}_text_model",
            **stated_text(architecture),
            "num_attention_heads": text.heads,
            "layer_norm_eps": text.eps,
            "pad_token_id": library.pad_token_id if architecture.padding_id is None else architecture.padding_id,
        },
        "vision_config": hub_tower_config(architecture.image_encoder, architecture.vision, library.model_type),
    }


def _reference(
    checkpoint: Checkpoint, architecture: ChineseClipArchitecture, library: LibraryNames, part: Part
) -> Reference:
    stated = _config_from_architecture(architecture, library)
    model = transformers_model(checkpoint, library.class_name, stated, library.renamed)
    return reference_from_encoder(model, part, architecture.vision.image_size)
