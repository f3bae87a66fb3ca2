from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_export.models.from_uint8 import PreprocessedVision
from vlm_export.runtime.image import preprocess_image
from vlm_export.specs import ImageSpec
from vlm_export.verify.samples import synthetic_photographs


def spec(size: int, resample: Literal["bicubic", "bilinear"] = "bicubic") -> ImageSpec:
    return ImageSpec(size, resample, "after_crop", (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def levels_apart(image: Image.Image, image_spec: ImageSpec) -> np.ndarray:
    """Differences from the host path, in units of one of 256 levels."""
    module = PreprocessedVision(image_spec, torch.nn.Identity()).eval()
    found = module(torch.from_numpy(np.asarray(image).copy())[None]).numpy()[0]
    expected = preprocess_image(image, image_spec)
    return np.asarray(np.abs(found - expected) * np.array(image_spec.std).reshape(3, 1, 1) * 255)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 31])
def test_photographs_are_within_one_level_of_pillow(size: int, resample: Literal["bicubic", "bilinear"]) -> None:
    for image in synthetic_photographs():
        apart = levels_apart(image.convert("RGB"), spec(size, resample))
        assert apart.max() < 1.01
        # Pillow's weights are fixed-point, so ties round the other way now and then.
        assert (apart > 0.5).mean() < 1e-2


# Not more than twice as tall as wide: there Pillow 13 changes the order of its passes.
SIZES = [(1, 1), (1, 5), (2, 1), (224, 224), (225, 224), (223, 300), (37, 51), (640, 481), (333, 999), (481, 960)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_noise_of_any_size_is_within_one_level_of_pillow(height: int, width: int) -> None:
    assert levels_apart(noise(height, width), spec(224)).max() < 1.01


def test_rows_of_a_batch_are_independent() -> None:
    module = PreprocessedVision(spec(32), torch.nn.Identity()).eval()
    pictures = torch.from_numpy(np.stack([np.asarray(noise(40, 50)), np.asarray(noise(40, 50).rotate(180))]))
    together = module(pictures)
    assert torch.equal(together[1], module(pictures[1:])[0])


def test_a_wrong_filter_is_far_off() -> None:
    image = synthetic_photographs()[0].convert("RGB")
    module = PreprocessedVision(spec(64, "bilinear"), torch.nn.Identity()).eval()
    found = module(torch.from_numpy(np.asarray(image).copy())[None]).numpy()[0]
    assert np.abs(found - preprocess_image(image, spec(64))).max() * 0.26 * 255 > 3
