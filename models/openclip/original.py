"""What the proof of the contract runs for these checkpoints: open_clip's own encoders, transform and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm_export.family import Arrays, BuildOptions, Checkpoint, Part, Reference, WeightStore
from vlm_export.models.openclip.config import OpenClipArchitecture
from vlm_export.models.openclip.hf_text import hf_encoder, original_hf_text, text_pad_id
from vlm_export.models.openclip.towers import fill_computed_tables
from vlm_export.models.openclip.weights import text_prefix
from vlm_export.models.reading.weights import float32, published_score
from vlm_export.original import OpenClipOriginal, OpenClipTokenizer, Original, SimpleTokenizerOriginal


def original(
    checkpoint: Checkpoint,
    architecture: OpenClipArchitecture,
    preprocess: Any,
    parts: Sequence[Part],
    store: WeightStore,
    options: BuildOptions,
) -> Original:
    """What the proof of the contract runs.

    Args:
        preprocess: what the config says about images.
        store: where weights live that are not float32.
    """
    text = architecture.text_cfg
    # Other sizes are computed by this project alone: open_clip resamples positions only while it loads a file.
    same_size = options.image_size is None and not options.dynamic_image_size
    encoders = {
        part.name: partial(_encoder, checkpoint, architecture, part, store)
        for part in parts
        if same_size or part.name == "text"
    }
    texts = OpenClipTokenizer(text.clean) if text.hf_tokenizer_name else SimpleTokenizerOriginal(None)
    return Original(
        OpenClipOriginal(dict(preprocess or {})),
        texts,
        encoders,
        "open_clip CustomTextCLIP",
        published_score(checkpoint),
    )


def _encoder(checkpoint: Checkpoint, architecture: OpenClipArchitecture, part: Part, store: WeightStore) -> Reference:
    """open_clip's `encode_image` or `encode_text`, with the weights of that encoder alone."""
    tower = original_tower(architecture, part.name)
    prefix = "visual." if part.name == "vision" else text_prefix(checkpoint.tensors)
    keys = {key.removeprefix(prefix): key for key in checkpoint.tensors if key.startswith(prefix)}
    weights = {
        name: float32(checkpoint.read(keys[name]), store) for name in tower.state_dict(keep_vars=True) if name in keys
    }
    missing = [name for name, _ in tower.named_parameters() if name not in weights]
    if missing:
        raise ValueError(f"open_clip's model has weights that the checkpoint lacks: {', '.join(missing[:5])}")
    tower.load_state_dict(weights, strict=False, assign=True)
    context, pad = architecture.text_cfg.context_length, text_pad_id(architecture)

    def run(inputs: Arrays) -> dict[str, Any]:
        (array,) = (inputs[name] for name in part.signature.input_names)
        if part.name == "text":
            # As open_clip's tokenizer does.
            array = np.pad(array, ((0, 0), (0, context - array.shape[1])), constant_values=pad)
        with torch.inference_mode():
            features = tower(torch.from_numpy(np.ascontiguousarray(array)))
        return {part.signature.output_names[0]: features.numpy()}

    return run


def original_tower(architecture: OpenClipArchitecture, name: str) -> nn.Module:
    """open_clip's own module of the encoder `name`, without weights."""
    from open_clip.model import CustomTextCLIP

    # What training alone needs, and tokens beside the embedding, are left out.
    vision = replace(architecture.vision_cfg, patch_dropout=0.0, output_tokens=False, timm_model_pretrained=False)
    text = replace(architecture.text_cfg, output_tokens=False)
    encoder = hf_encoder(architecture)
    if name == "text" and encoder is not None:
        return original_hf_text(encoder, architecture).eval()
    # Its own encoder stands in for one of transformers, which the image encoder does not need.
    text = replace(text, hf_model_name=None)
    with torch.device("meta"):
        model = CustomTextCLIP(
            architecture.embed_dim, _fields(vision), _fields(text), quick_gelu=architecture.quick_gelu
        ).eval()
    tower: nn.Module = model.visual if name == "vision" else model.text
    if name == "text" and not text.no_causal_mask:
        tower.attn_mask = torch.full((text.context_length, text.context_length), float("-inf")).triu_(1)
    fill_computed_tables(tower)
    return tower.eval()


def _fields(config: Any) -> dict[str, Any]:
    """A section as open_clip reads it."""
    removed = ("global_average_pool", "input_patchnorm")
    return {key: value for key, value in config.to_json().items() if key not in removed}
