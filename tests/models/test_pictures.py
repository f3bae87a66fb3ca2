"""What `preprocessor_config.json` may state, and which sizes of pictures a user may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions, Checkpoint
from vlm_export.models.pictures import IMAGE_MEAN, IMAGE_STD, apply_image_size, published_normalisation
from vlm_export.models.vit import VisionTransformer, VitForm
from vlm_export.specs import Fit

# As openai/clip-vit-* and Salesforce/blip-* were published, and as later versions of transformers save them.
OLD_CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "resample": 3,
    "size": 224,
}
NEW_CLIP = {
    **OLD_CLIP,
    "crop_size": {"height": 224, "width": 224},
    "do_convert_rgb": True,
    "do_rescale": True,
    "image_processor_type": "CLIPImageProcessor",
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
OLD_BLIP = {"do_normalize": True, "do_resize": True, "resample": 3, "size": 224, "size_divisor": 32}
NEW_BLIP = {
    **OLD_BLIP,
    "crop_size": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "size": {"height": 224, "width": 224},
}


def read(folder: Path, config: dict[str, Any] | str, fit: Fit = "crop") -> tuple[Any, Any]:
    path = folder / "preprocessor_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    checkpoint = Checkpoint("x", "hf_directory", (), {}, lambda key: torch.empty(0), {}, {path.name: path})
    return published_normalisation(checkpoint, 224, fit)


@pytest.mark.parametrize(
    ("config", "fit"),
    [({}, "crop"), ({}, "squash"), (OLD_CLIP, "crop"), (NEW_CLIP, "crop"), (OLD_BLIP, "squash"), (NEW_BLIP, "squash")],
)
def test_published_forms_are_read(tmp_path: Path, config: dict[str, Any], fit: Fit) -> None:
    assert read(tmp_path, config, fit) == (IMAGE_MEAN, IMAGE_STD)
    stated = {**config, "image_mean": [0.5, 0.25, 0], "image_std": [0.5, 0.25, 1]}
    assert read(tmp_path, stated, fit) == ((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", 2),
        ("resample", "bilinear"),
        ("do_normalize", False),
        ("do_normalize", 1),
        ("do_resize", False),
        ("do_rescale", False),
        ("rescale_factor", 1),
        ("rescale_factor", "1/255"),
        ("rescale_factor", 10**60),
        ("size", 256),
        ("size", {"shortest_edge": 256}),
        ("size", {"longest_edge": 224}),
    ],
)
@pytest.mark.parametrize(("config", "fit"), [(NEW_CLIP, "crop"), (NEW_BLIP, "squash")])
def test_other_steps_are_refused(tmp_path: Path, config: dict[str, Any], fit: Fit, key: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, {**config, key: value}, fit)
    assert key in caught.value.what
    assert caught.value.where.endswith(f"preprocessor_config.json: {key}")
    assert repr(value) in caught.value.got
    assert caught.value.expected


@pytest.mark.parametrize(
    ("fit", "config"),
    [
        ("crop", {"do_center_crop": False}),
        ("crop", {"crop_size": 192}),
        ("crop", {"crop_size": {"height": 224, "width": 192}}),
        ("crop", {"size": {"height": 224, "width": 224}}),
        ("squash", {"do_center_crop": True}),
        ("squash", {"size": {"shortest_edge": 224}}),
    ],
)
def test_the_other_familys_way_to_a_square_is_refused(tmp_path: Path, fit: Fit, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not the published one"):
        read(tmp_path, config, fit)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"image_mean": [1' + "0" * 400 + ", 0, 0]}",
        '{"image_mean": [1e300, 0, 0]}',
        '{"image_mean": [NaN, 0, 0]}',
        '{"image_mean": [true, 0, 0]}',
        '{"image_mean": {"0": 1, "1": 1, "2": 1}}',
        '{"image_mean": [0, 0, 0, 0]}',
        '{"image_std": [0, 0, 0]}',
        '{"image_std": [1e999, 1, 1]}',
        '{"image_std": [-1, 1, 1]}',
        '{"image_std": [1e-300, 1, 1]}',
        '{"image_mean": [0, 0, 0], "image_mean": [1, 1, 1]}',
        "[]",
    ],
    ids=lambda text: text[:30],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"preprocessor_config\.json is malformed") as caught:
        read(tmp_path, text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", ["x", 0, -8, 12, 8.0, True, 8_000_000, 10**60])
def test_an_unusable_size_is_the_users_mistake(size: object) -> None:
    with torch.device("meta"):
        vision = VisionTransformer(VitForm(width=8, layers=1, heads=1, hidden=8, patch_size=8, grid=2))
    with pytest.raises(UsageError, match="multiple of the patch size") as caught:
        apply_image_size(vision, 16, BuildOptions(image_size=cast(int, size)))
    assert caught.value.got == repr(size)[:80]
