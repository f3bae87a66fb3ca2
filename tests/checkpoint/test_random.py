"""Seeded random weights: reproducible, order independent, usable."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_export.checkpoint import random as random_weights
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import EnvironmentFailure
from vlm_export.family import Family, Part, StoredTensorInfo
from vlm_export.models.clip.family import ClipFamily
from vlm_export.models.minicpmv.family import MiniCpmVFamily
from vlm_export.models.minicpmv.omnilmm import OmniLmmFamily

TENSORS = {
    "token_embedding.weight": StoredTensorInfo((200, 64), "float16"),
    "block.mlp.weight": StoredTensorInfo((256, 64), "float32"),
    "text_projection": StoredTensorInfo((64, 256), "bfloat16"),
    "conv.weight": StoredTensorInfo((32, 16, 3, 3), "float32"),
    "norm.weight": StoredTensorInfo((512,), "float32"),
    "norm.bias": StoredTensorInfo((512,), "float32"),
    "bn.running_var": StoredTensorInfo((512,), "float32"),
    "class_embedding": StoredTensorInfo((256,), "float32"),
    "logit_scale": StoredTensorInfo((), "float32"),
    "bn.num_batches_tracked": StoredTensorInfo((), "int64"),
}
_RESAMPLER = {"queries": 16, "width": 128, "heads": 1}
# Small in all but the depth: EVA-02's blocks add norms of their branches, SigLIP's branches of norms.
POST_NORM: dict[str, Any] = {
    "version": "omnilmm",
    "vision": {
        "kind": "vit", "width": 128, "layers": 64, "heads": 4, "hidden": 512, "patch_size": 14, "grid": 4,
        "post_norm": True, "antialias": True,
    },
    "resampler": {**_RESAMPLER, "states_width": 128, "positions": "stored", "query_positions": True},
    "image_size": 56,
}  # fmt: skip
PRE_NORM: dict[str, Any] = {
    "version": "2.0",
    "vision": {
        "kind": "vit", "width": 144, "layers": 32, "heads": 2, "hidden": 576, "patch_size": 14, "grid": 4,
        "has_class_token": False, "antialias": True,
    },
    "resampler": {**_RESAMPLER, "states_width": 144, "positions": "grid", "query_positions": True},
    "image_size": 56,
}  # fmt: skip
DEEP: dict[str, tuple[Family, dict[str, Any]]] = {
    "post-norm": (OmniLmmFamily(), POST_NORM),
    "pre-norm": (MiniCpmVFamily(), PRE_NORM),
}
Usage = namedtuple("Usage", "total used free")


def test_shapes_dtypes_and_distributions(tmp_path: Path) -> None:
    checkpoint = random_checkpoint("demo", TENSORS, 0, tmp_path / "w.safetensors")
    assert (checkpoint.source, checkpoint.format) == ("demo", "random")
    assert dict(checkpoint.tensors) == TENSORS
    read = {key: checkpoint.read(key).float() for key in TENSORS}
    assert float(read["logit_scale"]) == pytest.approx(math.log(100))
    assert float(read["bn.num_batches_tracked"]) == 0
    deviations = {key: float(tensor.std()) for key, tensor in read.items() if tensor.dim() >= 2}
    expected = {
        "token_embedding.weight": 0.02,
        "block.mlp.weight": 64**-0.5,
        "text_projection": 64**-0.5,
        "conv.weight": (2 / (16 * 9)) ** 0.5,
    }
    assert deviations == pytest.approx(expected, rel=0.05)
    assert float(read["norm.weight"].mean()) == pytest.approx(1, abs=0.05)
    assert float(read["norm.bias"].mean()) == pytest.approx(0, abs=0.05)
    assert float(read["bn.running_var"].min()) > 0.5
    assert all(tensor.isfinite().all() for tensor in read.values())


def test_the_file_is_the_one_that_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    (file,) = random_checkpoint("demo", TENSORS, 0, path).files
    raw = path.read_bytes()
    assert (file.name, file.size_bytes) == (path.name, len(raw))
    assert file.sha256 == hashlib.sha256(raw).hexdigest()
    assert dict(open_checkpoint(str(path)).tensors) == TENSORS


def test_neither_order_nor_company_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_checkpoint("demo", TENSORS, 5, tmp_path / "whole")
    reverse = random_checkpoint("demo", dict(reversed(TENSORS.items())), 5, tmp_path / "reverse")
    monkeypatch.setattr(random_weights, "_CHUNK", 1000)
    alone = random_checkpoint("demo", {"conv.weight": TENSORS["conv.weight"]}, 5, tmp_path / "alone")
    other = random_checkpoint("demo", TENSORS, 6, tmp_path / "other")
    expected = whole.read("conv.weight")
    assert torch.equal(expected, reverse.read("conv.weight"))
    assert torch.equal(expected, alone.read("conv.weight"))
    assert not torch.equal(expected, other.read("conv.weight"))


@pytest.mark.parametrize("variant", ["vit_w128", "rn_tiny"])
def test_a_model_of_random_weights_tells_inputs_apart(tmp_path: Path, clip_data: Path, variant: str) -> None:
    family = ClipFamily()
    architecture = family.describe(open_checkpoint(str(clip_data / variant / "jit_archive.pt"))).architecture
    checkpoint = random_checkpoint("tiny", family.published_tensors(architecture), 0, tmp_path / "w")
    assert family.describe(checkpoint).architecture == architecture
    with ScratchStore(tmp_path / "scratch") as store, torch.inference_mode():
        for part in family.build(checkpoint, store).parts:
            first, second = (
                part.module(*map(torch.from_numpy, part.examples({"batch": 1, "sequence": 8}, seed).values()))
                for seed in (0, 1)
            )
            assert float((first - second).abs().max()) > 0.01 * float(first.abs().max())
            assert 0.01 < float(first.abs().max()) < 100


@contextmanager
def deep_vision(folder: Path, family: Family, architecture: dict[str, Any]) -> Iterator[tuple[Part, torch.Tensor]]:
    """The vision part with random weights, and images for it."""
    torch.set_num_threads(1)
    tensors, config = family.published_tensors(architecture), family.published_config(architecture)
    checkpoint = random_checkpoint("deep", tensors, 0, folder / "w", config)
    with ScratchStore(folder / "scratch") as store, torch.inference_mode():
        part = family.build(checkpoint, store).parts[0]
        sizes = {axis.name: 56 for axis in part.signature.axes} | {"batch": 2}
        yield part, torch.from_numpy(part.examples(sizes, 0)["pixel_values"])


@pytest.mark.parametrize("norms", list(DEEP))
def test_deep_models_pass_errors_on_without_growth(tmp_path: Path, norms: str) -> None:
    with deep_vision(tmp_path, *DEEP[norms]) as (part, pixels):
        expected = part.module(pixels)
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
        moved = part.module(pixels * (1 + 1e-6 * noise)) - expected
        assert float(moved.abs().max()) < 1e-4 * float(expected.abs().max())
        assert float((expected[0] - expected[1]).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("norms", list(DEEP))
def test_every_tensor_of_a_deep_model_matters(tmp_path: Path, norms: str) -> None:
    """Zeroed, or with its rows reversed, each moves the output by ten times what the fp32 gate lets pass."""
    family, architecture = DEEP[norms]
    last = architecture["vision"]["layers"] - 1
    passed_over = tuple(f".blocks.{i}." for i in range(1, last))
    with deep_vision(tmp_path, family, architecture) as (part, pixels):
        expected = part.module(pixels)
        for name, parameter in part.module.named_parameters():
            # The bias of keys adds the same to all scores of a query, and the softmax takes it out again.
            if any(block in name for block in passed_over) or name.endswith(".key.bias"):
                continue
            original = parameter.clone()
            for changed in (torch.zeros_like(original), original.flip(0)):
                parameter.copy_(changed)
                moved = (part.module(pixels) - expected).abs().max() / expected.abs().max()
                assert float(moved) > 1e-3, name
            parameter.copy_(original)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    with pytest.raises(EnvironmentFailure, match="not enough disk space"):
        random_checkpoint("demo", TENSORS, 0, tmp_path / "w")
    assert not list(tmp_path.iterdir())
