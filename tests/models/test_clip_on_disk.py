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
from vlm_export.models.registry import recognise

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
    checkpoint = open_checkpoint(str(path))
    return recognise(checkpoint).describe(checkpoint)


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
