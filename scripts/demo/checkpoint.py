"""Demo checkpoints: CLIP's as OpenAI publishes state dicts, published keys' tensors, and reading any of them back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from demo.accuracy import Embeddings, EncodeImage, EncodeText
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.family import Model
from vlm_export.models.clip.architecture import ClipArchitecture, VitSizes
from vlm_export.models.clip.encoders import ClipEncoders
from vlm_export.models.clip.weights import openai_vit_table
from vlm_export.models.reading.weights import Kept, Rows, Transposed, Unsqueezed
from vlm_export.models.registry import recognise
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import ImageSpec

# `convert_weights` of openai/CLIP model.py (d05afc4) halves convolutions, linear layers, attention and the two
# projections; norms, embeddings and the logit scale stay float32.
_HALVED = (".conv1.weight", ".attn.", ".mlp.", "text_projection", "visual.proj")
_BATCH = 128

Item = TypeVar("Item")


def openai_state_dict(encoders: ClipEncoders, architecture: ClipArchitecture) -> dict[str, Tensor]:
    """The weights under OpenAI's keys and in its dtypes."""
    vision, text = architecture.towers
    assert isinstance(vision, VitSizes)
    table = openai_vit_table(vision.layers, text.layers)
    ours = encoders.state_dict()
    return {
        key: _stored(key, ours[target])
        for key, target in sorted(table.items(), key=lambda entry: entry[0])
        if isinstance(target, str)
    }


def _stored(key: str, weight: Tensor) -> Tensor:
    halved = any(part in key for part in _HALVED)
    return weight.detach().to(torch.float16 if halved else torch.float32).clone().contiguous()


def load_model(path: Path) -> Model:
    """The model of a checkpoint file, in float32, through the project's own reader."""
    checkpoint = open_checkpoint(str(path))
    # The mappings outlive the scratch file.
    with tempfile.TemporaryDirectory() as folder, ScratchStore(Path(folder) / "weights.bin") as store:
        return recognise(checkpoint).build(checkpoint, store)


def torch_encoders(model: Model, tokenizer_path: Path) -> tuple[EncodeImage, EncodeText]:
    """The model's two parts in PyTorch behind the runtime's preprocessing, as the metric takes them."""
    image_spec, text_spec = model.image, model.text
    assert isinstance(image_spec, ImageSpec)
    assert text_spec is not None
    tokenizer = Tokenizer(tokenizer_path, text_spec)
    modules = {part.name: part.module for part in model.parts}

    def encode_image(images: Sequence[Image.Image]) -> Embeddings:
        return _encode(modules["vision"], images, lambda batch: pixel_values(batch, image_spec))

    def encode_text(texts: Sequence[str]) -> Embeddings:
        return _encode(modules["text"], texts, lambda batch: torch.from_numpy(tokenizer.encode(batch)))

    return encode_image, encode_text


def pixel_values(images: Sequence[Image.Image], spec: ImageSpec) -> Tensor:
    """float32 (B, 3, S, S), prepared as the runtime does."""
    return torch.from_numpy(np.stack([preprocess_image(image, spec) for image in images]))


def _encode(module: nn.Module, items: Sequence[Item], prepare: Callable[[Sequence[Item]], Tensor]) -> Embeddings:
    with torch.inference_mode():
        rows = [module(prepare(items[i : i + _BATCH])).numpy() for i in range(0, len(items), _BATCH)]
    return np.concatenate(rows)


def stored(ours: Mapping[str, Tensor], target: Kept) -> Tensor:
    """The parameter, or the part of it, that a published key holds: the inverse of loading. Matrices are float16."""
    if isinstance(target, str):
        weight = ours[target]
    elif isinstance(target, Rows):
        weight = torch.cat(ours[target.name].chunk(target.count)[target.index : target.index + target.span])
    elif isinstance(target, Transposed):
        weight = ours[target.name].T
    else:
        assert isinstance(target, Unsqueezed)
        weight = ours[target.name].reshape(*[1] * target.axes, *ours[target.name].shape)
    dtype = torch.float16 if weight.squeeze().ndim >= 2 else torch.float32
    return weight.detach().to(dtype).clone().contiguous()
