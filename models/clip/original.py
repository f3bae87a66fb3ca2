"""Whose code prepares inputs for a CLIP checkpoint and computes its embeddings: transformers, open_clip or OpenAI.

OpenAI's own package runs the archive's code; open_clip's `CLIP` is its copy, with the same keys. Source: open_clip
3.3.0 model.py (`CLIP`, `build_model_from_openai_state_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm_export.family import Arrays, BuildOptions, Checkpoint, Part, Reference, WeightStore
from vlm_export.models.clip.architecture import ClipArchitecture, ResNetSizes, VitSizes
from vlm_export.models.reading.image_processor import processor_files
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.models.reading.weights import float32, published_score, unboxed
from vlm_export.original import (
    Original,
    SimpleTokenizerOriginal,
    TorchvisionPipeline,
    TransformersOriginal,
)

# Of OpenAI's state dicts: what is no weight.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_VISION = "visual."


def original(
    checkpoint: Checkpoint,
    architecture: ClipArchitecture,
    parts: Sequence[Part],
    store: WeightStore,
    options: BuildOptions,
    model_type: str,
) -> Original:
    """What the proof of the contract runs.

    Args:
        architecture: as the checkpoint has it, before any option.
        store: where weights live that are not float32.
        model_type: transformers' name for such models.
    """
    scale = published_score(checkpoint)
    if architecture.key_names == "huggingface":
        classes = TransformersOriginal(model_type, "CLIPImageProcessor")
        return Original(classes, classes, score=scale)
    # Other sizes are computed by this project alone: open_clip resamples positions only while it loads a file.
    same_size = options.image_size is None and not options.dynamic_image_size
    encoders = {
        part.name: partial(encoder, checkpoint, _model_config(architecture), part, store)
        for part in parts
        if same_size and None not in (architecture.vision, architecture.text)
    }
    name = "open_clip CLIP" if encoders else ""
    if processor_files(checkpoint):
        return Original(
            TransformersOriginal("clip", "CLIPImageProcessor"), SimpleTokenizerOriginal(), encoders, name, scale
        )
    transform = TorchvisionPipeline(
        "_transform of openai/CLIP clip.py, by torchvision",
        "bicubic",
        crop=True,
        rgb_first=False,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
    )
    return Original(transform, SimpleTokenizerOriginal(), encoders, name, scale)


def _model_config(architecture: ClipArchitecture) -> dict[str, Any]:
    """open_clip's `model_cfg` of weights that OpenAI published."""
    vision, text = architecture.towers
    return {
        "embed_dim": architecture.embed_dim,
        "quick_gelu": architecture.activation == "quick_gelu",
        "vision_cfg": vision_config(vision),
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.hidden / text.width,
        },
    }


def vision_config(vision: VitSizes | ResNetSizes) -> dict[str, Any]:
    """open_clip's `vision_cfg` of an image encoder under OpenAI's key names."""
    sizes: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width}
    if isinstance(vision, ResNetSizes):
        return {**sizes, "layers": list(vision.stages), "head_width": vision.width * 32 // vision.heads}
    return {
        **sizes,
        "layers": vision.layers,
        "patch_size": vision.patch_size,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": vision.hidden / vision.width,
    }


def encoder(checkpoint: Checkpoint, config: Mapping[str, Any], part: Part, store: WeightStore) -> Reference:
    """open_clip's `encode_image` or `encode_text`, with the weights of that encoder alone."""
    from open_clip.model import CLIP

    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "nonscalar_logit_scale")
    with torch.device("meta"):
        model = CLIP(**{key: config[key] for key in known if key in config}).eval()
    is_vision = part.name == "vision"
    wanted = [key for key in model.state_dict() if key.startswith(_VISION) is is_vision and key not in _NUMBERS]
    weights = {key: float32(checkpoint.read(key), store) for key in wanted if key in checkpoint.tensors}
    model.load_state_dict(unboxed(weights, model), strict=False, assign=True)
    _check_loaded(model, is_vision)
    context = int(model.context_length)
    model.attn_mask = torch.full((context, context), float("-inf")).triu_(1)

    def run(inputs: Arrays) -> dict[str, Any]:
        (array,) = (inputs[name] for name in part.signature.input_names)
        with torch.inference_mode():
            if is_vision:
                features = model.encode_image(torch.from_numpy(np.ascontiguousarray(array)))
            else:
                # As open_clip's tokenizer does: zeros up to the context.
                padded = np.pad(array, ((0, 0), (0, context - array.shape[1])))
                features = model.encode_text(torch.from_numpy(padded))
        return {part.signature.output_names[0]: features.numpy()}

    return run


def _check_loaded(model: nn.Module, is_vision: bool) -> None:
    missing = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_meta and name.startswith(_VISION) is is_vision and not name.startswith("logit")
    ]
    if missing:
        raise ValueError(f"open_clip's model has weights that the checkpoint lacks: {', '.join(missing[:5])}")
