"""CLIP weights of open_clip without their config: what the user says about them, against open_clip itself."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions, Model
from vlm_export.models.clip.family import ClipFamily
from vlm_export.models.registry import identify

forms = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("open_clip_forms.py"))))
CONFIG = forms.CONFIG
config = forms.config
save = forms.save
text = forms.text
vision = forms.vision
Array = npt.NDArray[Any]
Build = Callable[..., Model]
Same = Callable[..., None]
PLAIN = config(custom_text=False, text_cfg=text(width=64))
OTHER_HEADS = config(custom_text=False, vision_cfg=vision(head_width=16), text_cfg=text(width=64, heads=4))


def inputs() -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 49406, (3, 16))
    ids[[0, 1, 2], [15, 4, 11]] = 49407
    return rng.standard_normal((3, 3, 24, 24)).astype(np.float32), ids


def outputs_of(original: Any) -> tuple[Array, Array]:
    pixels, ids = map(torch.from_numpy, inputs())
    with torch.inference_mode():
        return original.encode_image(pixels).numpy(), original.encode_text(ids).numpy()


def eager(model: Model) -> list[Array]:
    with torch.inference_mode():
        return [p.module(torch.from_numpy(feed)).numpy() for p, feed in zip(model.parts, inputs(), strict=True)]


def assert_alike(model: Model, original: Any, assert_same: Same) -> None:
    for got, expected in zip(eager(model), outputs_of(original), strict=True):
        assert_same(got, expected)


def told(**choices: int | str) -> BuildOptions:
    """What the user says about weights that do not say it themselves."""
    return BuildOptions(family_options=choices)


@pytest.fixture(scope="module")
def other_heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("heads") / "model"
    original = save(folder, OTHER_HEADS)
    (folder / CONFIG).unlink()
    return folder, original


@pytest.mark.parametrize(
    "wrong",
    [
        told(activation="quick_gelu", head_width=16, text_heads=4),
        told(activation="gelu", text_heads=4),
        told(activation="gelu", head_width=16),
    ],
    ids=["activation", "image heads", "text heads"],
)
def test_a_wrong_choice_is_seen(wrong: BuildOptions, other_heads: tuple[Path, Any], build_model: Build) -> None:
    folder, original = other_heads
    pairs = zip(eager(build_model(folder, wrong)), outputs_of(original), strict=True)
    assert max(np.abs(got - rows).max() for got, rows in pairs) > 1e-2


def test_the_right_choices_are_enough(other_heads: tuple[Path, Any], build_model: Build, assert_same: Same) -> None:
    folder, original = other_heads
    right = told(activation="gelu", head_width=16, text_heads=4)
    assert_alike(build_model(folder, right), original, assert_same)


def test_options_describe_a_lone_training_checkpoint(tmp_path: Path, build_model: Build, assert_same: Same) -> None:
    original = save(tmp_path / "model", PLAIN)
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": original.state_dict()}, path)
    (warning,) = build_model(path).warnings
    assert all(word in warning for word in ("--set activation=", "--set head_width=", "--set text_heads=", CONFIG))
    (warning,) = build_model(path, told(activation="gelu")).warnings
    assert "activation" not in warning
    assert "head_width" in warning
    model = build_model(path, told(activation="gelu", head_width=32, text_heads=2))
    assert model.warnings == ()
    assert_alike(model, original, assert_same)
    with pytest.raises(UsageError, match="multiple of head_width"):
        build_model(path, told(head_width=48))
    # The config beside a file that is named is read as well, recorded, and says all that the options would.
    (tmp_path / CONFIG).write_text(json.dumps(PLAIN))
    family, checkpoint = identify(open_checkpoint(str(path)))
    assert [file.name for file in checkpoint.files] == ["epoch_3.pt", CONFIG]
    assert family.name == "openclip"
    assert_alike(build_model(path), original, assert_same)


def test_options_describe_widths_that_64_does_not_divide(tmp_path: Path, build_model: Build, assert_same: Same) -> None:
    narrow = config(
        custom_text=False,
        vision_cfg=vision(width=40, head_width=10),
        text_cfg=text(width=24, heads=3),
    )
    original = save(tmp_path / "model", narrow)
    (tmp_path / "model" / CONFIG).unlink()
    assert ClipFamily().describe(open_checkpoint(str(tmp_path / "model"))).warnings
    with pytest.raises(InputError, match="multiple of its heads"):
        build_model(tmp_path / "model")
    model = build_model(tmp_path / "model", told(activation="gelu", head_width=10, text_heads=3))
    assert_alike(model, original, assert_same)
