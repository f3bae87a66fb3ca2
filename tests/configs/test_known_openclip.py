"""The configs of open_clip's published models are open_clip's own, and so are their keys."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from transformers import AutoConfig

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.models.openclip.config import open_clip_image, read_architecture
from vlm_export.models.openclip.family import OpenClipFamily
from vlm_export.models.openclip.hf_text import HF_ENCODERS

Config = dict[str, Any]
# One config of each kind of model, whose keys at full size are open_clip's.
ONE_OF_EACH = re.compile(
    "h-14-378|b-32-laion2b-s34|eva02-b|eva02-e-14-laion|base-w|mobileclip2-b|mobileclip2-s0|mobileclip2-s4|siglip2-w|siglip-w|roberta-large|p-roberta"
)

PUBLISHED = [name for name in known_names() if load_known(name).family == "openclip"]


def published_by_open_clip(name: str) -> tuple[Config, Config]:
    """open_clip's own config of a model that our config names in its notes, and how it prepares images."""
    import open_clip

    model, tag = str(load_known(name).notes).rpartition(" for ")[2].split()
    weights = open_clip.pretrained.get_pretrained_cfg(model, tag)
    stated = open_clip.get_model_config(model)
    if weights.get("quick_gelu"):
        stated["quick_gelu"] = True
    return stated, {**weights, "hub": str(weights["hf_hub"]).rstrip("/")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_those_of_open_clip(name: str) -> None:
    known = load_known(name)
    stated, weights = published_by_open_clip(name)
    assert known.source.hub == weights["hub"]
    found = read_architecture({"model_cfg": known.architecture}, name)
    assert found == read_architecture({"model_cfg": stated}, name)
    preprocess = {key: weights[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    assert known.image == open_clip_image(preprocess, found.vision_cfg.image_edge)[0]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if ONE_OF_EACH.search(name)])
def test_published_keys_are_those_of_open_clip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_known(name)
    stated = {key: value for key, value in published_by_open_clip(name)[0].items() if key != "custom_text"}
    stated["text_cfg"] = {**stated["text_cfg"], "hf_model_pretrained": False}
    encoders = {name: AutoConfig.for_model(e.kind, **e.config_fields) for name, e in HF_ENCODERS.items()}
    monkeypatch.setattr("open_clip.hf_model.AutoConfig", SimpleNamespace(from_pretrained=encoders.__getitem__))
    cls = CustomTextCLIP if known.architecture.get("custom_text") or "hf_model_name" in stated["text_cfg"] else CLIP
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in cls(**stated).state_dict().items()}
    expected = {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
    found = OpenClipFamily().published_tensors(known.architecture)
    assert {key: info.shape for key, info in found.items()} == expected
