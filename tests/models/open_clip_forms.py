"""Tiny models of open_clip with random weights, in the forms that it publishes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from vlm_export.models.layers.bert import BertSizes
from vlm_export.models.openclip.hf_text import HF_ENCODERS, HfEncoder, Kind

Config = dict[str, Any]
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
VISION: Config = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 24, "head_width": 32}
TEXT: Config = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TIMM: Config = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": None}

HF_SIZES = BertSizes(48, 2, 3, 96, 300, 90, 0, 1e-5)


def config(preprocess: Config | None = None, /, **fields: Any) -> Config:
    """The content of open_clip_config.json."""
    model = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True, **fields}
    return {"model_cfg": model, "preprocess_cfg": preprocess or {}}


def vision(**fields: Any) -> Config:
    return {**VISION, **fields}


def text(**fields: Any) -> Config:
    return {**TEXT, **fields}


def save(folder: Path, stated: Config, seed: int = 0) -> Any:
    """Saves a model with random weights as `push_to_hf_hub` of open_clip does; returns what open_clip reads there."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(stated))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    shake(model, seed)
    save_file(model.state_dict(), folder / WEIGHTS)
    return open_clip.create_model(f"local-dir:{folder}").eval()


def shake(model: torch.nn.Module, seed: int) -> None:
    """Random weights in which no parameter keeps what it was initialised with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 25
            parameter.copy_((parameter.mean() if parameter.ndim < 2 else 0.0) + noise / width**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                # Several branches are summed behind them.
                buffer.copy_(4 + 4 * torch.rand(buffer.shape, generator=generator))


def save_hf(folder: Path, kind: Kind, pad: int, rows: int, stated: Config, patch: pytest.MonkeyPatch) -> Any:
    """As `save`, where both libraries find a tiny encoder under the name `tiny`."""
    encoder = HfEncoder(kind, replace(HF_SIZES, vocab_size=rows), 1 if kind == "xlm-roberta" else 2, pad)
    patch.setitem(HF_ENCODERS, "tiny", encoder)
    named = AutoConfig.for_model(kind, **encoder.config_fields)
    patch.setattr("open_clip.hf_model.AutoConfig", SimpleNamespace(from_pretrained={"tiny": named}.__getitem__))
    return save(folder, stated)
