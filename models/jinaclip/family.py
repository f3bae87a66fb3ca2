"""Jina CLIP: EVA-02 beside JinaBERT (v1) or Jina's XLM-RoBERTa with an adapter for each task (v2).

Port of jinaai/jina-clip-implementation modeling_clip.py, valid for `JinaCLIPModel` directories without projections. Its
code is remote, and never run: what each part is a port of stands at the head of that part's file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm_export.errors import InputError
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
from vlm_export.models.jinaclip.architecture import (
    TEXT,
    XLM_TEXT,
    JinaClipArchitecture,
    JinaClipOptions,
    architecture_from_checkpoint,
    config_from_architecture,
)
from vlm_export.models.jinaclip.original import original
from vlm_export.models.jinaclip.text import JinaText
from vlm_export.models.jinaclip.vision import EvaVision
from vlm_export.models.jinaclip.weights import ROOTS, note_adapter, stored_tensors, weight_table, with_merged_adapter
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.openclip.config import open_clip_image
from vlm_export.models.reading.image_processor import IMAGE_PROCESSOR_FILE, Prepared, read_json_object
from vlm_export.models.reading.images import ImageExamples, apply_image_size
from vlm_export.models.reading.token_ids import EDGES, random_ids
from vlm_export.models.reading.weights import load_weights
from vlm_export.specs import Origins, TextSpec
from vlm_export.specs.codec import Spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

_IMAGE_CLASS = "JinaCLIPImageProcessor"
# By the text encoder: [SEP] of bert-base-uncased, </s> of XLM-R.
_END_IDS = {"jina-bert": 102, "jina-xlm-roberta": 2}
_VOCABULARIES = {"jina-bert": "bert-base-uncased", "jina-xlm-roberta": "XLM-R"}


class JinaClipFamily:
    """jina-clip-v1 and jina-clip-v2."""

    name = "jinaclip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = JinaClipOptions
    marks: tuple[str, ...] = (f"{TEXT}emb_ln.weight", f"{XLM_TEXT}emb_ln.weight")
    roots: tuple[str, ...] = ROOTS
    config_types: Mapping[str, tuple[str, ...]] = {"jina_clip": ("JinaCLIPModel",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        return "vision_model.cls_token" in keys and any(mark in keys for mark in self.marks)

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = architecture_from_checkpoint(checkpoint)
        image, origins = _image(architecture, checkpoint)
        return Description(
            architecture.to_json(),
            outlines(_parts(architecture, _build_encoders(architecture))),
            tuple(_notes(architecture)),
            _warnings(architecture, checkpoint),
            image=image,
            text=_text_spec(architecture),
            origins=origins | _text_origins(architecture),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        architecture = architecture_from_checkpoint(checkpoint, options)
        merged = with_merged_adapter(checkpoint, architecture.text.lora)
        encoders = _build_encoders(architecture)
        dropped = load_weights(encoders, merged, weight_table(architecture), store)
        note_adapter(encoders.text, architecture.text.lora, checkpoint)
        apply_image_size(encoders.vision, architecture.vision.image_size, options)
        parts = tuple(_parts(architecture, encoders))
        image, origins = _image(architecture, checkpoint)
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=_hub_config(checkpoint, architecture),
            tasks=(
                EmbedSpec(
                    EncoderSpec("vision", "image_embeds"),
                    EncoderSpec("text", "text_embeds"),
                    ScoreSpec("softmax", float(encoders.logit_scale)),
                ),
            ),
            dropped_keys=dropped,
            references={part.name: partial(reference_from_module, part) for part in parts},
            reference_name="unpatched eager module",
            warnings=_warnings(architecture, checkpoint),
            original=original(merged, architecture, _preprocessor(checkpoint), parts, store),
            origins=origins | _text_origins(architecture),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = JinaClipArchitecture.from_config(architecture)
        return stored_tensors(_build_encoders(parsed), parsed)

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return config_from_architecture(JinaClipArchitecture.from_config(architecture))


class _Encoders(nn.Module):
    """Both encoders and the logit scale, as one module to load weights into."""

    def __init__(self, architecture: JinaClipArchitecture) -> None:
        super().__init__()
        self.vision = EvaVision(architecture.vision, architecture.embed_dim)
        self.text = JinaText(architecture.text, architecture.embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))


def _build_encoders(architecture: JinaClipArchitecture) -> _Encoders:
    """The modules on the meta device: shapes without weights; tables that code computes are filled."""
    with meta_modules():
        return _Encoders(architecture)


def _parts(architecture: JinaClipArchitecture, encoders: _Encoders) -> Iterator[Part]:
    """Both encoders, in the order in which they are exported."""
    size, output = architecture.vision.image_size, ("batch", architecture.embed_dim)
    vision = Signature(
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
        outputs=(TensorSpec("image_embeds", "float32", output),),
        axes=(Axis("batch"),),
    )
    yield Part("vision", encoders.vision, vision, ImageExamples(vision))
    text = Signature(
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("text_embeds", "float32", output),),
        axes=(Axis("batch"), Axis("sequence", 1, architecture.max_length)),
    )
    yield Part("text", encoders.text, text, _TextExamples(architecture))


class _TextExamples:
    """Random ids, and padding from a random position of each row on.

    The first row's comes late enough for the vocabulary's edges to stand before it.
    """

    def __init__(self, architecture: JinaClipArchitecture) -> None:
        self.vocab_size, self.pad_id = architecture.text.vocab_size, architecture.text.pad_id

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        rows, tokens = sizes["batch"], sizes["sequence"]
        ids = random_ids(rng, (rows, tokens), self.vocab_size, without=self.pad_id)
        lengths = rng.integers(1, tokens + 1, rows)
        lengths[0] = max(lengths[0], min(EDGES, tokens))
        for row, length in zip(ids, lengths, strict=True):
            row[length:] = self.pad_id
        return {"input_ids": ids}


def _notes(architecture: JinaClipArchitecture) -> Iterator[str]:
    text = architecture.text
    yield "its own code is remote and not run: other libraries' classes prove that both encoders compute the same"
    yield "a text is the mean of its tokens; padding is told by its id, as the original tells it"
    if text.kind == "jina-bert":
        yield "ALiBi stands for positions: scores fall with the distance, at another rate in each head"
    else:
        yield f"rotary positions with the base {text.rotary_base:g}, which the text encoder's own config states"
    if text.lora is not None:
        chosen = "none of them" if text.lora.task is None else f"{text.lora.task}, merged into the weights"
        yield f"adapters lie beside the weights ({', '.join(text.lora.tasks)}); texts are encoded with {chosen}"
    yield f"texts are cut to {architecture.max_length} tokens (--set max_length)"
    if architecture.matryoshka:
        yield f"embeddings may be cut to {', '.join(map(str, architecture.matryoshka))} numbers (--set truncate_dim)"


def _warnings(architecture: JinaClipArchitecture, checkpoint: Checkpoint) -> tuple[str, ...]:
    found = []
    length = architecture.truncate_dim
    if length is not None and length not in architecture.matryoshka:
        trained = ", ".join(map(str, architecture.matryoshka)) or "none"
        found.append(
            f"embeddings are cut to {length} numbers, but were trained to be cut to (matryoshka_dimensions): {trained}"
        )
    if checkpoint.format != "random" and IMAGE_PROCESSOR_FILE not in checkpoint.side_files:
        found.append(
            f"no file says how images are prepared: the defaults of {_IMAGE_CLASS} are taken. Put the checkpoint's "
            f"{IMAGE_PROCESSOR_FILE} beside the weights"
        )
    return tuple(found)


def _preprocessor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The fields of preprocessor_config.json, none without the file.

    Raises:
        InputError: it is of another class than Jina CLIP's.
    """
    path = checkpoint.side_files.get(IMAGE_PROCESSOR_FILE)
    stated = {} if path is None else read_json_object(path)
    if stated.get("image_processor_type", _IMAGE_CLASS) != _IMAGE_CLASS:
        raise InputError(
            "the image processor is of another class than Jina CLIP's",
            where=f"{IMAGE_PROCESSOR_FILE}: image_processor_type",
            expected=_IMAGE_CLASS,
            got=f"{stated['image_processor_type']!r:.200}",
            fix="take the processor file that was saved with the model",
        )
    return stated


def _image(architecture: JinaClipArchitecture, checkpoint: Checkpoint) -> Prepared:
    """As `encode_image` prepares an image: in RGB first, then by the transform, which is a copy of open_clip's."""
    stated, edge = _preprocessor(checkpoint), architecture.vision.image_size
    size = stated.get("size", edge)
    if size not in (edge, [edge], [edge, edge]):
        raise InputError(
            "the image processor and the image encoder are of different sizes",
            where=f"{IMAGE_PROCESSOR_FILE}: size",
            expected=f"{edge}, as the image encoder's weights say",
            got=f"{size!r:.200}",
            fix="these files belong to different models, or one of them was changed: correct the wrong one",
        )
    spec, origins = open_clip_image(stated, edge, IMAGE_PROCESSOR_FILE, fields="", library=_IMAGE_CLASS)
    own = {"image.rgb_stage": "JinaCLIPModel.encode_image", "image.size_pixels": "the image encoder's weights"}
    return replace(spec, rgb_stage="before_resize"), origins | Origins(own)


def _text_spec(architecture: JinaClipArchitecture) -> TextSpec:
    text = architecture.text
    return TextSpec(
        context_length=architecture.max_length,
        vocab_size=text.vocab_size,
        end_token_id=min(_END_IDS[text.kind], text.vocab_size - 1),
        pad_token_id=text.pad_id,
        cleaning="none",
        pooling="mean",
    )


def _text_origins(architecture: JinaClipArchitecture) -> Origins:
    """What states the fields of the TextSpec, before a tokenizer has its say."""
    vocabulary = _VOCABULARIES[architecture.text.kind]
    return Origins(
        {
            "text.context_length": "JinaCLIPModel.encode_text, or --set max_length",
            "text.vocab_size": "rows of the word embedding",
            "text.end_token_id": vocabulary,
            "text.pad_token_id": "config.json: text_config",
            "text.cleaning": "the tokenizer alone",
            "text.padding": "the model does not see padding",
            "text.case": "default of the tokenizer's class",
            "text.pooling": "config.json: text_config.pooler_type",
        }
    )


def _hub_config(checkpoint: Checkpoint, architecture: JinaClipArchitecture) -> dict[str, Any]:
    """The checkpoint's config.json without the names of remote code, for embeddings as long as they are now."""
    stated = {key: value for key, value in (checkpoint.config or {}).items() if key != "auto_map"}
    length = {"truncate_dim": architecture.truncate_dim, "projection_dim": architecture.embed_dim}
    return {**stated, **(length if architecture.truncate_dim else {})}
