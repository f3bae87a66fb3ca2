"""CLIP as people have it on disk: what trainers, torch and open_clip make of one and the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError
from vlm_export.family import Description, Model
from vlm_export.models.recognition import left_out_warnings
from vlm_export.models.registry import identify

Weights = dict[str, torch.Tensor]
Build = Callable[[Path], Model]


@pytest.fixture(scope="module")
def make_weights() -> Callable[..., Weights]:
    """The state dict of a tiny `open_clip.model.CLIP` whose fields the keywords replace."""
    from open_clip.model import CLIP

    def make(**vision: Any) -> Weights:
        torch.manual_seed(0)
        model = CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 64, **vision},
            text_cfg={"context_length": 77, "vocab_size": 600, "width": 64, "heads": 1, "layers": 2},
            quick_gelu=True,
        )
        return {key: value.detach().clone() for key, value in model.state_dict().items()}

    return make


@pytest.fixture(scope="module")
def weights(make_weights: Callable[..., Weights]) -> Weights:
    return make_weights()


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def describe(path: Path) -> Description:
    family, checkpoint = identify(open_checkpoint(str(path)))
    return family.describe(checkpoint)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        describe(path)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_scale_with_axes_of_one(tmp_path: Path, weights: Weights, build_model: Build, shape: tuple[int, ...]) -> None:
    boxed = {**weights, "logit_scale": weights["logit_scale"].reshape(shape)}
    model = build_model(saved(boxed, tmp_path / "scale.pt"))
    assert model.facts["logit_scale"] == pytest.approx(float(weights["logit_scale"]), abs=0)


def test_a_sigmoid_loss_is_named(tmp_path: Path, weights: Weights) -> None:
    message = refusal(saved({**weights, "logit_bias": torch.tensor(-10.0)}, tmp_path / "bias.pt"))
    assert "sigmoid" in message
    assert "delete logit_bias" in message


def test_positions_of_no_square_are_named(tmp_path: Path, make_weights: Callable[..., Weights]) -> None:
    message = refusal(saved(make_weights(image_size=(64, 32)), tmp_path / "tall.pt"))
    assert "the position table has 8 patches, which is no square" in message
    assert "images that are not square are not supported" in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "clipmodel.", "module._orig_mod.net.clip."])
def test_one_common_prefix(tmp_path: Path, weights: Weights, prefix: str) -> None:
    value = {f"{prefix}{key}": tensor for key, tensor in weights.items()}
    family, checkpoint = identify(open_checkpoint(str(saved(value, tmp_path / "prefixed.pt"))))
    assert (family.name, list(checkpoint.tensors), checkpoint.left_out) == ("clip", list(weights), ())
    assert checkpoint.notes == (f"the prefix '{prefix}' was taken off the keys",)
    assert torch.equal(checkpoint.read("visual.proj"), weights["visual.proj"])


def test_heads_beside_the_towers_are_named(tmp_path: Path, weights: Weights) -> None:
    head = {"ff_head.weight": torch.ones(5, 32), "ff_head.bias": torch.zeros(5)}
    for prefix in ("", "clip."):
        value = {**{f"{prefix}{key}": tensor for key, tensor in weights.items()}, **head}
        family, checkpoint = identify(open_checkpoint(str(saved(value, tmp_path / "head.pt"))))
        assert (family.name, checkpoint.left_out) == ("clip", tuple(head))
        assert left_out_warnings(checkpoint) == (
            "2 tensors beside the model were left out: ff_head. What is exported does not compute them",
        )


def test_a_copy_of_training_is_left_out(tmp_path: Path, weights: Weights) -> None:
    value = {f"{prefix}{key}": tensor for prefix in ("model.", "ema_model.") for key, tensor in weights.items()}
    checkpoint = identify(open_checkpoint(str(saved(value, tmp_path / "ema.pt"))))[1]
    assert checkpoint.notes[0] == "the prefix 'model.' was taken off the keys"
    assert "ema_model.*" in checkpoint.notes[1]
    value = {f"{prefix}{key}": tensor for prefix in ("first.", "second.") for key, tensor in weights.items()}
    message = refusal(saved(value, tmp_path / "two.pt"))
    assert "several models side by side" in message
    assert "first.* (clip), second.* (clip)" in message
