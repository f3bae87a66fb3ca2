"""CLIP: image encoder (ViT or ModifiedResNet) and causal text encoder, each with its projection.

Ports of openai/CLIP model.py (d05afc4) and transformers 5.23 models/clip/modeling_clip.py, valid for the nine
OpenAI downloads, state dicts with the same keys (fine-tuned, or of open_clip: `clip_open.py`), and Hugging Face
`CLIPModel` directories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm_export.family import (
    CHOICES,
    DEFAULT_BUILD,
    Array,
    Arrays,
    BuildOptions,
    Checkpoint,
    Description,
    Model,
    Part,
    PartOutline,
    Reference,
    TensorInfo,
    WeightStore,
    reference_from_module,
)
from vlm_export.models import clip_architecture, clip_open, clip_original, clip_weights
from vlm_export.models.clip_architecture import (
    ClipArchitecture,
    ResNetSizes,
    VitSizes,
    stated_text,
    stated_vision,
)
from vlm_export.models.clip_encoders import build_encoders
from vlm_export.models.image_processor import (
    Prepared,
    image_size_origin,
    processor_files,
    same_origin,
    transformers_image,
    with_chosen_size,
)
from vlm_export.models.pictures import (
    IMAGE_MEAN,
    IMAGE_STD,
    PictureExamples,
    apply_image_size,
    config_of_size,
    picture_shape,
)
from vlm_export.models.token_ids import EDGES, random_ids
from vlm_export.models.weights import Target, load_weights, published_tensors
from vlm_export.signature import Axis, Signature, TensorSpec
from vlm_export.specs import Origins, TextSpec, torchvision_image_spec

BATCH = Axis("batch")
_HF_WORDS = "text_model.embeddings.token_embedding.weight"


class ClipFamily:
    """OpenAI's key names and Hugging Face's."""

    name = "clip"
    reads: tuple[str, ...] = ()
    choices: tuple[str, ...] = CHOICES
    marks: tuple[str, ...] = ("visual.conv1.weight", "vision_model.pre_layrnorm.weight", _HF_WORDS)
    roots: tuple[str, ...] = (*clip_weights.OPENAI_ROOTS, *clip_weights.HF_ROOTS)
    config_types: Mapping[str, tuple[str, ...]] = {"clip": ("CLIPModel",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        openai = "visual.conv1.weight" in keys and "token_embedding.weight" in keys
        return openai or ("visual_projection.weight" in keys and "vision_model.pre_layrnorm.weight" in keys)

    def describe(self, checkpoint: Checkpoint) -> Description:
        huggingface = "visual_projection.weight" in checkpoint.tensors
        clip_open.refuse_sigmoid(checkpoint)
        architecture = _architecture(checkpoint) if huggingface else clip_open.described_architecture(checkpoint)
        encoders = build_encoders(architecture)
        modules = (("vision", encoders.vision, _vision_signature), ("text", encoders.text, _text_signature))
        parts = tuple(
            PartOutline(name, signature(architecture), sum(p.numel() for p in module.parameters()))
            for name, module, signature in modules
        )
        warnings = clip_open.assumptions(checkpoint, architecture)
        image, origins = _image(architecture, architecture.vision.image_size, checkpoint)
        return Description(
            architecture.to_json(),
            parts,
            tuple(_notes(architecture)),
            warnings,
            image=image,
            text=_text_spec(architecture),
            origins=origins,
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        architecture = _architecture(checkpoint, options)
        encoders = build_encoders(architecture)
        dropped = load_weights(encoders, checkpoint, _table(architecture), store)
        published, architecture = architecture, _resized(architecture, encoders.vision, options)
        vision = _vision_signature(architecture, options.dynamic_image_size)
        image, origins = _image(published, architecture.vision.image_size, checkpoint)
        parts = (
            Part("vision", encoders.vision, vision, PictureExamples(vision)),
            Part("text", encoders.text, _text_signature(architecture), _TextExamples(architecture)),
        )
        huggingface = architecture.key_names == "huggingface"
        build_reference = (
            partial(_transformers_reference, checkpoint, published) if huggingface else reference_from_module
        )
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=config_of_size(
                (checkpoint.config if huggingface else None) or _config_from_architecture(architecture),
                architecture.vision.image_size,
            ),
            facts={"logit_scale": float(encoders.logit_scale), "activation": architecture.activation},
            dropped_keys=dropped,
            references={part.name: partial(build_reference, part) for part in parts},
            reference_name="transformers CLIPModel" if huggingface else "unpatched eager module",
            warnings=clip_open.assumptions(checkpoint, architecture, options),
            original=clip_original.original(checkpoint, published, parts, store, options),
            origins=origins,
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, TensorInfo]:
        parsed = clip_architecture.architecture_from_json(architecture)
        return published_tensors(build_encoders(parsed), _table(parsed), dtype="float16")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        parsed = clip_architecture.architecture_from_json(architecture)
        return _config_from_architecture(parsed) if parsed.key_names == "huggingface" else None


def _architecture(checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> ClipArchitecture:
    clip_open.refuse_sigmoid(checkpoint)
    if "visual_projection.weight" in checkpoint.tensors:
        clip_open.refuse_choices(options, checkpoint)
        return clip_architecture.architecture_from_huggingface(checkpoint)
    return clip_open.clip_architecture(checkpoint, options)


def _table(architecture: ClipArchitecture) -> dict[str, Target]:
    vision, text_layers = architecture.vision, architecture.text.layers
    if isinstance(vision, ResNetSizes):
        return clip_weights.openai_resnet_table(vision.stages, text_layers)
    if architecture.key_names == "huggingface":
        return clip_weights.huggingface_table(vision.layers, text_layers)
    return clip_weights.openai_vit_table(vision.layers, text_layers)


def _notes(architecture: ClipArchitecture) -> Iterator[str]:
    text = architecture.text
    where = "the highest token id" if text.pooling == "argmax" else f"the first token {text.end_token_id}"
    yield f"text is pooled at {where}; the causal mask is cut to T, so T tokens cost T (1 to {text.context_length})"
    if architecture.activation == "quick_gelu":
        yield "QuickGELU (x · sigmoid(1.702 x)), not the GELU of later CLIP models: a wrong one changes every embedding"
    if isinstance(architecture.vision, ResNetSizes):
        yield "ModifiedResNet with attention pooling: no transformers model has it"
    size = architecture.vision.image_size
    yield f"pictures are {size} pixels square; a ViT takes --image-size and --dynamic-image-size"


def _resized(architecture: ClipArchitecture, vision: nn.Module, options: BuildOptions) -> ClipArchitecture:
    """Applies the options to the image encoder; returns the architecture with the size that it has now."""
    image_size = apply_image_size(vision, architecture.vision.image_size, options)
    return replace(architecture, vision=replace(architecture.vision, image_size=image_size))


def _vision_signature(architecture: ClipArchitecture, dynamic_image_size: bool = False) -> Signature:
    vision = architecture.vision
    patch_size = vision.patch_size if isinstance(vision, VitSizes) else 1
    shape, axes = picture_shape(vision.image_size, patch_size, dynamic_image_size)
    return Signature(
        inputs=(TensorSpec("pixel_values", "float32", shape),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH, *axes),
    )


def _text_signature(architecture: ClipArchitecture) -> Signature:
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH, Axis("sequence", 1, architecture.text.context_length)),
    )


class _TextExamples:
    """Random ids with end-of-text at a random position (a different one in each row) and padding after it.

    The first row's comes late enough for the vocabulary's edges to stand before it.
    """

    def __init__(self, architecture: ClipArchitecture) -> None:
        self.sizes = architecture.text

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


def _image(architecture: ClipArchitecture, image_size: int, checkpoint: Checkpoint) -> Prepared:
    """For images of `image_size`; the checkpoint states its own architecture's."""
    published = architecture.vision.image_size
    if stated := clip_open.open_clip_image(checkpoint, published):
        return with_chosen_size(stated, image_size)
    if architecture.key_names == "openai" and not processor_files(checkpoint):
        spec = torchvision_image_spec(published, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD)
        origins = {**same_origin(spec, "openai/CLIP clip.py"), "image.size_pixels": "the image encoder's weights"}
        return with_chosen_size((spec, Origins(origins)), image_size)
    prepared = transformers_image(checkpoint, "CLIPImageProcessor", published, image_size_origin(checkpoint))
    return with_chosen_size(prepared, image_size)


def _text_spec(architecture: ClipArchitecture) -> TextSpec:
    text = architecture.text
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


def _config_from_architecture(architecture: ClipArchitecture) -> dict[str, Any]:
    """`config.json` in the form of transformers' `CLIPConfig`."""
    text = architecture.text
    legacy = architecture.key_names == "huggingface" and text.pooling == "argmax"
    common = {"hidden_act": architecture.activation, "layer_norm_eps": architecture.eps}
    vision = architecture.vision
    vision_config: dict[str, Any] = {"image_size": vision.image_size, "num_channels": 3, **common}
    if isinstance(vision, VitSizes):
        vision_config |= {**stated_vision(vision), "num_attention_heads": vision.heads}
    else:
        # transformers has no ModifiedResNet; the sizes are told for the reader.
        vision_config |= {"hidden_size": vision.width * 32, "stages": list(vision.stages)}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": architecture.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            **stated_text(text),
            "num_attention_heads": text.heads,
            "eos_token_id": clip_architecture.LEGACY_END_TOKEN_ID if legacy else text.end_token_id,
            **common,
        },
        "vision_config": {"model_type": "clip_vision_model", **vision_config},
    }


def _transformers_reference(checkpoint: Checkpoint, architecture: ClipArchitecture, part: Part) -> Reference:
    from transformers import CLIPConfig, CLIPModel

    # Of checked sizes alone: whatever else the checkpoint's own config states may be made to hurt.
    stated = _config_from_architecture(architecture)
    # No ids that only generation reads, which transformers would compare with the vocabulary.
    stated["text_config"] |= {"bos_token_id": None, "pad_token_id": None}
    config = CLIPConfig.from_dict(stated)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = CLIPModel(config).eval()
    weights = {key: checkpoint.read(key).float() for key in checkpoint.tensors if not key.endswith("position_ids")}
    model.load_state_dict(weights, strict=True, assign=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    name = part.signature.input_names[0]
    encode = model.get_image_features if part.name == "vision" else model.get_text_features
    own_size = model.config.vision_config.image_size
    is_resized = part.name == "vision" and part.signature.inputs[0].shape[2:] != (own_size, own_size)
    other_size = {"interpolate_pos_encoding": True} if is_resized else {}

    def run(inputs: Arrays) -> dict[str, Array]:
        with torch.inference_mode():
            features = encode(**{name: torch.from_numpy(inputs[name])}, **other_size)
        # transformers 5 wraps the features in an output object, 4 returned the tensor.
        tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return {part.signature.output_names[0]: tensor.numpy()}

    return run
