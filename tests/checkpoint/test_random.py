"""Seeded random weights: reproducible, order independent, usable."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from vlm_export.checkpoint import random as random_weights
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import EnvironmentFailure
from vlm_export.family import TensorInfo
from vlm_export.models.clip import ClipFamily

TENSORS = {
    "token_embedding.weight": TensorInfo((200, 64), "float16"),
    "block.mlp.weight": TensorInfo((256, 64), "float32"),
    "text_projection": TensorInfo((64, 256), "bfloat16"),
    "conv.weight": TensorInfo((32, 16, 3, 3), "float32"),
    "norm.weight": TensorInfo((512,), "float32"),
    "norm.bias": TensorInfo((512,), "float32"),
    "bn.running_var": TensorInfo((512,), "float32"),
    "class_embedding": TensorInfo((256,), "float32"),
    "logit_scale": TensorInfo((), "float32"),
    "bn.num_batches_tracked": TensorInfo((), "int64"),
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


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        random_checkpoint("demo", TENSORS, 0, tmp_path / "w")
    assert not list(tmp_path.iterdir())
