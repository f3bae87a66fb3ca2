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
    ChineseClipArchitecture,
    architecture_from_checkpoint,
    is_original,
    stated_text,
)
from vlm_export.models.chineseclip.original import original
from vlm_export.models.chineseclip.parts import build_encoders, build_parts
from vlm_export.models.chineseclip.weights import ROOTS, weight_table
from vlm_export.models.clip.architecture import ResNetSizes, stated_in, stated_vision
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

_CLASS = "ChineseCLIPModel"
# bert-base-chinese's; a tokenizer that is read says its own.
_SEP_ID, _PAD_ID = 102, 0


class ChineseClipFamily:
    """The authors' key names and transformers'."""

    name = "chineseclip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = ("visual.conv1.weight", "vision_model.pre_layrnorm.weight")
    roots: tuple[str, ...] = ROOTS
    config_types: Mapping[str, tuple[str, ...]] = {"chinese_clip": (_CLASS,)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        images, texts = self.marks, ("bert.{}", "text_model.{}")
        words = [key.format("embeddings.word_embeddings.weight") for key in texts]
        return any({mark, word} <= set(checkpoint.tensors) for mark, word in zip(images, words, strict=True))

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = architecture_from_checkpoint(checkpoint)
        image, origins = _image(architecture, architecture.vision.image_size, checkpoint)
        return Description(
            architecture.to_json(),
            outlines(build_parts(architecture, build_encoders(architecture))),
            tuple(_notes(architecture)),
            image=image,
            text=_text_spec(architecture),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        published = architecture_from_checkpoint(checkpoint)
        encoders = build_encoders(published)
        dropped = load_weights(encoders, checkpoint, weight_table(published), store)
        image_size = apply_image_size(encoders.vision, published.vision.image_size, options)
        architecture = replace(published, vision=replace(published.vision, image_size=image_size))
        parts = tuple(build_parts(architecture, encoders, dynamic_image_size=options.dynamic_image_size))
        image, origins = _image(published, image_size, checkpoint)
        huggingface = architecture.key_names == "huggingface"
        build_reference = partial(_reference, checkpoint, published) if huggingface else reference_from_module
        stated = checkpoint.config if huggingface else None
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=config_of_size(stated or _config_from_architecture(architecture), image_size),
            tasks=(
                EmbedSpec(
                    EncoderSpec("vision", "image_embeds"),
                    EncoderSpec("text", "text_embeds"),
                    ScoreSpec("softmax", float(encoders.logit_scale)),
                ),
            ),
            dropped_keys=dropped,
            references={part.name: partial(build_reference, part) for part in parts},
            reference_name=f"transformers {_CLASS}" if huggingface else "unpatched eager module",
            original=original(checkpoint, published, parts, store, options),
            origins=origins | _text_origins(architecture, checkpoint),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = ChineseClipArchitecture.from_config(architecture)
        dtype = "float32" if parsed.key_names == "huggingface" else "float16"
        return published_tensors(build_encoders(parsed), weight_table(parsed), dtype)

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        parsed = ChineseClipArchitecture.from_config(architecture)
        return _config_from_architecture(parsed) if parsed.key_names == "huggingface" else None


def _notes(architecture: ChineseClipArchitecture) -> Iterator[str]:
    yield f"text is read at [CLS], without BERT's pooler; texts have at most {architecture.context_length} tokens"
    yield "images are stretched to a square where the files do not say otherwise"
    if isinstance(architecture.vision, ResNetSizes):
        yield "ModifiedResNet with attention pooling: no transformers model has it"


def _image(architecture: ChineseClipArchitecture, image_size: int, checkpoint: Checkpoint) -> Prepared:
    """For images of `image_size`; the checkpoint states its own architecture's."""
    published = architecture.vision.image_size
    if not is_original(checkpoint) or processor_files(checkpoint):
        origin = image_size_origin(checkpoint)
        return with_chosen_size(
            transformers_image(checkpoint, "ChineseCLIPImageProcessor", published, origin), image_size
        )
    spec = torchvision_image_spec(published, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD, "stretch")
    origins = {
        **same_origin(spec, "OFA-Sys/Chinese-CLIP cn_clip/clip/utils.py"),
        "image.size_pixels": "the image encoder's weights",
    }
    return with_chosen_size((spec, Origins(origins)), image_size)


def _text_spec(architecture: ChineseClipArchitecture) -> TextSpec:
    rows = architecture.text.vocab_size
    return TextSpec(
        context_length=architecture.context_length,
        vocab_size=rows,
        end_token_id=min(_SEP_ID, rows - 1),
        pad_token_id=_PAD_ID,
        cleaning="none",
        pooling="first_token",
    )


def _text_origins(architecture: ChineseClipArchitecture, checkpoint: Checkpoint) -> Origins:
    """What states the fields of the TextSpec, before a tokenizer has its say."""
    original = architecture.key_names == "original"
    pad = stated_in(checkpoint, "text", "pad_token_id").replace("CLIP", "ChineseCLIP")
    return Origins(
        {
            "text.context_length": "cn_clip: tokenize" if original else "rows of the position embedding",
            "text.vocab_size": "rows of the word embedding",
            "text.end_token_id": "bert-base-chinese",
            "text.pad_token_id": "bert-base-chinese" if original else pad,
            "text.cleaning": "BERT's tokenizer alone",
            "text.padding": "the model does not see padding",
            "text.case": "default of BertTokenizer",
            "text.pooling": "Chinese-CLIP: the first token",
        }
    )


def _config_from_architecture(architecture: ChineseClipArchitecture) -> dict[str, Any]:
    """`config.json` in the form of transformers' `ChineseCLIPConfig`."""
    vision, text = architecture.vision, architecture.text
    image: dict[str, Any] = {
        "model_type": "chinese_clip_vision_model",
        "image_size": vision.image_size,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "hidden_act": architecture.activation,
        "layer_norm_eps": architecture.eps,
    }
    if isinstance(vision, ResNetSizes):
        # transformers has no ModifiedResNet; the sizes are told for the reader.
        image |= {"hidden_size": vision.width * 32, "stages": list(vision.stages)}
    else:
        image |= stated_vision(vision)
    return {
        "model_type": "chinese_clip",
        "architectures": [_CLASS],
        "projection_dim": architecture.embed_dim,
        "text_config": {
            "model_type": "chinese_clip_text_model",
            **stated_text(text, architecture.token_types),
            "num_attention_heads": text.heads,
            "layer_norm_eps": text.eps,
            "pad_token_id": _PAD_ID,
        },
        "vision_config": image,
    }


def _reference(checkpoint: Checkpoint, architecture: ChineseClipArchitecture, part: Part) -> Reference:
    model = transformers_model(checkpoint, _CLASS, _config_from_architecture(architecture))
    return reference_from_encoder(model, part, architecture.vision.image_size)
