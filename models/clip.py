"""CLIP: image encoder (ViT or ModifiedResNet) and causal text encoder, each with its projection.

Ports of openai/CLIP model.py (d05afc4) and transformers 5.23 models/clip/modeling_clip.py, valid for the nine
OpenAI downloads, state dicts with the same keys, and Hugging Face `CLIPModel` directories.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm_export.errors import InputError, UsageError
from vlm_export.family import (
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
from vlm_export.models import clip_architecture, clip_weights
from vlm_export.models.clip_architecture import ClipArchitecture, ResNetSizes, TextSizes, VitSizes
from vlm_export.models.layers import PatchEmbedding, TransformerBlock, build_causal_mask, resample_position_embedding
from vlm_export.models.modified_resnet import ModifiedResNet
from vlm_export.models.weights import Target, load_weights, published_tensors
from vlm_export.signature import Axis, Signature, TensorSpec
from vlm_export.specs import ImageSpec, RgbStage, TextSpec

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = Axis("batch")
# Patches per side up to which a dynamic image size goes; attention is quadratic in their square.
_LARGEST_GRID = 64
Channels = tuple[float, float, float]


class VisionTransformer(nn.Module):
    """pixel_values float32 (B, 3, S, S), normalised → image_embeds float32 (B, D), not normalised."""

    def __init__(self, architecture: ClipArchitecture, sizes: VitSizes) -> None:
        super().__init__()
        width, eps = sizes.width, architecture.eps
        self.patch_size, self.grid = sizes.patch_size, sizes.image_size // sizes.patch_size
        self.dynamic_image_size = False
        self.patches = PatchEmbedding(width, sizes.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, width))
        self.norm_pre = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, sizes.heads, sizes.hidden, architecture.activation, eps)
            for _ in range(sizes.layers)
        )
        self.norm_post = nn.LayerNorm(width, eps=eps)
        self.projection = nn.Parameter(torch.empty(width, architecture.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patches(pixel_values)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.norm_pre(torch.cat([first, patches], dim=1) + self._positions(pixel_values))
        for block in self.blocks:
            x = block(x)
        embeds: Tensor = self.norm_post(x[:, 0]) @ self.projection
        return embeds

    def resize(self, image_size: int) -> None:
        """Takes pictures of another size from now on: resamples the position embedding, once."""
        grid = image_size // self.patch_size
        with torch.no_grad():
            resampled = resample_position_embedding(self.position_embedding, self.grid, grid, grid)
        self.position_embedding, self.grid = nn.Parameter(resampled, requires_grad=False), grid

    def _positions(self, pixel_values: Tensor) -> Tensor:
        if not self.dynamic_image_size:
            return self.position_embedding
        rows, columns = pixel_values.shape[2] // self.patch_size, pixel_values.shape[3] // self.patch_size
        return resample_position_embedding(self.position_embedding, self.grid, rows, columns)


class TextTransformer(nn.Module):
    """input_ids int64 (B, T), 1 ≤ T ≤ context length → text_embeds float32 (B, D), not normalised.

    Causal, so tokens after end-of-text cannot change the row: a batch needs only its longest row's T.
    """

    causal_mask: Tensor

    def __init__(self, architecture: ClipArchitecture, sizes: TextSizes) -> None:
        super().__init__()
        width, eps = sizes.width, architecture.eps
        self.width = width
        self.end_token_id = sizes.end_token_id if sizes.pooling == "first_end_token" else None
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.register_buffer("causal_mask", build_causal_mask(sizes.context_length), persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, sizes.heads, sizes.hidden, architecture.activation, eps)
            for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.projection = nn.Parameter(torch.empty(width, architecture.embed_dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.position_embedding[:tokens]
        mask = self.causal_mask[:tokens, :tokens]
        for block in self.blocks:
            x = block(x, mask)
        # The norm acts on each token alone, so pooling first gives the same row for a T-th of the work.
        end = self._end_positions(input_ids).reshape(-1, 1, 1).expand(-1, 1, self.width)
        pooled = x.gather(1, end).reshape(-1, self.width)
        embeds: Tensor = self.norm(pooled) @ self.projection
        return embeds

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        if self.end_token_id is None:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.end_token_id).to(torch.int32).argmax(dim=-1)


class ClipEncoders(nn.Module):
    """Both encoders and the logit scale, as one module to load weights into."""

    def __init__(self, architecture: ClipArchitecture) -> None:
        super().__init__()
        vision, embed_dim = architecture.vision, architecture.embed_dim
        self.vision: nn.Module
        if isinstance(vision, VitSizes):
            self.vision = VisionTransformer(architecture, vision)
        else:
            self.vision = ModifiedResNet(vision.stages, vision.width, vision.image_size, vision.heads, embed_dim)
        self.text = TextTransformer(architecture, architecture.text)
        self.logit_scale = nn.Parameter(torch.empty(()))


class ClipFamily:
    """OpenAI's key names and Hugging Face's."""

    name = "clip"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        openai = "visual.conv1.weight" in keys and "token_embedding.weight" in keys
        return openai or ("visual_projection.weight" in keys and "vision_model.pre_layrnorm.weight" in keys)

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = _architecture(checkpoint)
        encoders = build_encoders(architecture)
        modules = (("vision", encoders.vision, _vision_signature), ("text", encoders.text, _text_signature))
        parts = tuple(
            PartOutline(name, signature(architecture), sum(p.numel() for p in module.parameters()))
            for name, module, signature in modules
        )
        return Description(architecture.to_json(), parts, tuple(_notes(architecture)))

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        architecture = _architecture(checkpoint)
        encoders = build_encoders(architecture)
        dropped = load_weights(encoders, checkpoint, _table(architecture), store)
        architecture = _resized(architecture, encoders, options)
        vision = _vision_signature(architecture, options.dynamic_image_size)
        parts = (
            Part("vision", encoders.vision, vision, _VisionExamples(vision)),
            Part("text", encoders.text, _text_signature(architecture), _TextExamples(architecture)),
        )
        huggingface = architecture.key_names == "huggingface"
        build_reference = partial(_transformers_reference, checkpoint) if huggingface else reference_from_module
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=_image_spec(architecture, checkpoint),
            text=_text_spec(architecture),
            hub_config=checkpoint.config or _config_from_architecture(architecture),
            facts={"logit_scale": float(encoders.logit_scale), "activation": architecture.activation},
            dropped_keys=dropped,
            references={part.name: partial(build_reference, part) for part in parts},
            reference_name="transformers CLIPModel" if huggingface else "unpatched eager module",
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, TensorInfo]:
        parsed = clip_architecture.architecture_from_json(architecture)
        return published_tensors(build_encoders(parsed), _table(parsed), dtype="float16")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        parsed = clip_architecture.architecture_from_json(architecture)
        return _config_from_architecture(parsed) if parsed.key_names == "huggingface" else None


def _build_blocks(architecture: ClipArchitecture, sizes: VitSizes | TextSizes) -> nn.ModuleList:
    return nn.ModuleList(
        TransformerBlock(sizes.width, sizes.heads, sizes.hidden, architecture.activation, architecture.eps)
        for _ in range(sizes.layers)
    )


def build_encoders(architecture: ClipArchitecture) -> ClipEncoders:
    """The modules on the meta device: shapes without weights."""
    with torch.device("meta"):
        return ClipEncoders(architecture)


def _architecture(checkpoint: Checkpoint) -> ClipArchitecture:
    if "visual_projection.weight" in checkpoint.tensors:
        return clip_architecture.architecture_from_huggingface(checkpoint)
    return clip_architecture.architecture_from_openai(checkpoint)


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


def _resized(architecture: ClipArchitecture, encoders: ClipEncoders, options: BuildOptions) -> ClipArchitecture:
    """Applies the options to the image encoder; returns the architecture with the size that it has now."""
    if options == DEFAULT_BUILD:
        return architecture
    vision, sizes = encoders.vision, architecture.vision
    if not isinstance(vision, VisionTransformer) or not isinstance(sizes, VitSizes):
        raise UsageError("only a ViT takes another image size", got="ModifiedResNet", fix="leave the size options out")
    if options.image_size is not None:
        if options.image_size < sizes.patch_size or options.image_size % sizes.patch_size:
            raise UsageError(
                "the image size is not a multiple of the patch size",
                expected=f"a multiple of {sizes.patch_size}",
                got=str(options.image_size),
            )
        vision.resize(options.image_size)
        architecture = replace(architecture, vision=replace(sizes, image_size=options.image_size))
    vision.dynamic_image_size = options.dynamic_image_size
    return architecture


def _vision_signature(architecture: ClipArchitecture, dynamic_image_size: bool = False) -> Signature:
    vision = architecture.vision
    shape: tuple[int | str, ...] = ("batch", 3, vision.image_size, vision.image_size)
    axes: tuple[Axis, ...] = (BATCH,)
    if dynamic_image_size and isinstance(vision, VitSizes):
        patch = vision.patch_size
        largest = _LARGEST_GRID * patch
        axes = (BATCH, Axis("height", patch, largest, patch), Axis("width", patch, largest, patch))
        shape = ("batch", 3, "height", "width")
    return Signature(
        inputs=(TensorSpec("pixel_values", "float32", shape),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=axes,
    )


def _text_signature(architecture: ClipArchitecture) -> Signature:
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", architecture.embed_dim)),),
        axes=(BATCH, Axis("sequence", 1, architecture.text.context_length)),
    )


class _VisionExamples:
    """Normalised noise: every pixel independent, about the range of real normalised pictures."""

    def __init__(self, signature: Signature) -> None:
        self.spec = signature.inputs[0]

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {self.spec.name: rng.standard_normal(self.spec.concrete_shape(sizes), dtype=np.float32)}


class _TextExamples:
    """Random ids with end-of-text at a random position (a different one in each row) and padding after it."""

    def __init__(self, architecture: ClipArchitecture) -> None:
        self.sizes = architecture.text

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        rows, tokens = sizes["batch"], sizes["sequence"]
        ids = rng.integers(1, self.sizes.end_token_id, (rows, tokens), dtype=np.int64)
        for row in ids:
            end = int(rng.integers(0, tokens))
            row[end] = self.sizes.end_token_id
            row[end + 1 :] = 0
        return {"input_ids": ids}


def _image_spec(architecture: ClipArchitecture, checkpoint: Checkpoint) -> ImageSpec:
    mean, std = _published_normalisation(checkpoint)
    # Each published pipeline in its own order: OpenAI's converts to RGB last, transformers' first.
    rgb_stage: RgbStage = "after_crop" if architecture.key_names == "openai" else "before_resize"
    return ImageSpec(architecture.vision.image_size, "bicubic", rgb_stage, mean, std)


def _published_normalisation(checkpoint: Checkpoint) -> tuple[Channels, Channels]:
    """Mean and standard deviation from `preprocessor_config.json`, or OpenAI's."""
    path = checkpoint.side_files.get("preprocessor_config.json")
    if path is None:
        return IMAGE_MEAN, IMAGE_STD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        red, green, blue = (float(value) for value in data.get("image_mean", IMAGE_MEAN))
        std_red, std_green, std_blue = (float(value) for value in data.get("image_std", IMAGE_STD))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            "preprocessor_config.json is malformed",
            where=str(path),
            expected="image_mean and image_std, three numbers each",
        ) from error
    return (red, green, blue), (std_red, std_green, std_blue)


def _text_spec(architecture: ClipArchitecture) -> TextSpec:
    text = architecture.text
    openai = architecture.key_names == "openai"
    # OpenAI fills with id 0, transformers with end-of-text; neither is visible to the pooled token.
    pad = 0 if openai else text.end_token_id
    return TextSpec(text.context_length, text.vocab_size, text.end_token_id, pad, "openai" if openai else "none")


def _config_from_architecture(architecture: ClipArchitecture) -> dict[str, Any]:
    """`config.json` in the form of transformers' `CLIPConfig`."""
    text = architecture.text
    legacy = architecture.key_names == "huggingface" and text.pooling == "argmax"
    common = {"hidden_act": architecture.activation, "layer_norm_eps": architecture.eps}
    vision = architecture.vision
    vision_config: dict[str, Any] = {"image_size": vision.image_size, "num_channels": 3, **common}
    if isinstance(vision, VitSizes):
        vision_config |= {
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden,
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
        }
    else:
        # transformers has no ModifiedResNet; the sizes are told for the reader.
        vision_config |= {"hidden_size": vision.width * 32, "stages": list(vision.stages)}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": architecture.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": text.hidden,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "eos_token_id": clip_architecture.LEGACY_END_TOKEN_ID if legacy else text.end_token_id,
            **common,
        },
        "vision_config": {"model_type": "clip_vision_model", **vision_config},
    }


def _transformers_reference(checkpoint: Checkpoint, part: Part) -> Reference:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_dict(dict(checkpoint.config or {}))
    config._attn_implementation = "eager"
    model = CLIPModel(config).eval()
    weights = {key: checkpoint.read(key).float() for key in checkpoint.tensors if not key.endswith("position_ids")}
    model.load_state_dict(weights, strict=True)
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
