"""The published BLIP files load by key and shape, without their weights."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.models.blip import BlipFamily
from vlm_export.models.blip_architecture import BlipArchitecture
from vlm_export.models.blip_parts import build_modules
from vlm_export.models.registry import recognise

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blip_oracle.py"))))


MANIFESTS: dict[str, dict[str, tuple[int, ...]]] = oracle.read_manifests()
# Parameters of all, as the original counts them.
PUBLISHED = {
    "feature_extractor_base_224": 223_057_152,
    "feature_extractor_large_224": 445_278_720,
    "caption_base_384": 223_971_644,
    "caption_large_384": 446_290_492,
    "itm_base_384": 223_744_258,
    "itm_large_384": 446_128_642,
    "vqa_base_480": 361_478_972,
    "vqa_large_480": 583_880_764,
    "nlvr_base_384": 259_372_034,
    "nlvr_large_384": 486_409_474,
    "retrieval_ckpt_base_384": 223_744_258,
    "retrieval_ckpt_large_384": 446_128_642,
}
# With the temperature and the momentum copies of all but the matching head.
WITH_MOMENTUM = {"retrieval_ckpt_base_384": 447_486_979, "retrieval_ckpt_large_384": 892_255_747}


class MetaStore:
    """Weights without memory."""

    def new(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")


def published(name: str) -> Checkpoint:
    infos = {
        key: StoredTensorInfo(shape, "int64" if key.endswith(("position_ids", "idx_queue", "ptr_queue")) else "float32")
        for key, shape in MANIFESTS[name].items()
    }
    # One zero, seen at every place of the tensor.
    return Checkpoint(name, "state_dict", (), infos, lambda key: torch.zeros(1).expand(infos[key].shape))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_manifests_load_by_shape(name: str) -> None:
    checkpoint = published(name)
    family = recognise(checkpoint)
    assert isinstance(family, BlipFamily)
    model = family.build(checkpoint, MetaStore())
    modules = build_modules(BlipArchitecture.from_config(model.architecture))
    assert count(modules) == PUBLISHED[name]
    keys = {"feature_extractor": "text", "caption": "text_decoder", "vqa": "vqa_encoder", "nlvr": "pair_text"}
    assert keys.get(name.rsplit("_", 2)[0], "multimodal_text") in [part.name for part in model.parts]
    outlines = {part.name: part.parameter_count for part in family.describe(checkpoint).parts}
    assert outlines == {part.name: count(part.module) for part in model.parts}
    kept = set(MANIFESTS[name]) - set(model.dropped_keys)
    assert set(family.published_tensors(model.architecture)) == kept
    if name in WITH_MOMENTUM:
        momentum = [key for key in model.dropped_keys if "_m." in key and not key.endswith("position_ids")]
        copies = sum(int(np.prod(MANIFESTS[name][key])) for key in momentum)
        assert PUBLISHED[name] + copies + 1 == WITH_MOMENTUM[name]


def test_parts_hold_what_the_original_counts() -> None:
    caption = {part.name: part.parameter_count for part in BlipFamily().describe(published("caption_base_384")).parts}
    assert caption["vision"] == 86_090_496
    assert caption["cross_key_values"] + caption["text_decoder"] == 137_881_148
    features = BlipFamily().describe(published("feature_extractor_base_224")).parts
    counts = {part.name: part.parameter_count for part in features}
    assert (counts["vision"], counts["multimodal_text"]) == (85_798_656, 137_258_496)
    # Cross-attention: four matrices and biases, and a norm, in each of 12 layers.
    assert counts["multimodal_text"] - counts["text"] == 12 * (4 * (768 * 768 + 768) + 2 * 768)
    answers = {part.name: part.parameter_count for part in BlipFamily().describe(published("vqa_base_480")).parts}
    assert (answers["vision"], answers["vqa_encoder"]) == (86_339_328, 137_258_496)
