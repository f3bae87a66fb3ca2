from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_export.models.layers.from_uint8 import PreprocessedVision, unsupported_steps
from vlm_export.proof.samples import synthetic_photographs
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import ImageSpec, torchvision_image_spec

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def spec(size: int, resample: Literal["bicubic", "bilinear"] = "bicubic") -> ImageSpec:
    return torchvision_image_spec(size, resample, "after_crop", MEAN, STD)


def levels_apart(image: Image.Image, image_spec: ImageSpec, *, vertical_first: bool = False) -> np.ndarray:
    """Differences from the host path, in units of one of 256 levels."""
    module = PreprocessedVision(image_spec, torch.nn.Identity()).eval()
    pixels = torch.from_numpy(np.asarray(image).copy())[None]
    found = module(pixels.transpose(1, 2)).transpose(2, 3) if vertical_first else module(pixels)
    difference = np.abs(found.numpy()[0] - preprocess_image(image, image_spec))
    return np.asarray(difference * np.array(image_spec.std).reshape(3, 1, 1) * 255)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Pillow's weights are fixed-point, so that ties round the other way now and then. Largest share of values that were one
# level off in a photograph, times 1.5. Bilinear weights of small fractions make the most ties.
SHARES: tuple[tuple[Literal["bicubic", "bilinear"], int, float], ...] = (
    ("bicubic", 224, 1.5 * 6.7e-5),
    ("bicubic", 31, 1.5 * 1.1e-3),
    ("bilinear", 224, 1.5 * 2.6e-3),
    ("bilinear", 31, 1.5 * 3.5e-4),
)


@pytest.mark.parametrize(("resample", "size", "share"), SHARES)
def test_photographs_are_within_one_level_of_pillow(
    resample: Literal["bicubic", "bilinear"], size: int, share: float
) -> None:
    for image in synthetic_photographs():
        apart = levels_apart(image.convert("RGB"), spec(size, resample))
        assert apart.max() < 1.01
        assert (apart > 0.5).mean() < share


# Not more than twice as tall as wide: see `test_tall_images`.
SIZES = [(1, 1), (1, 5), (2, 1), (224, 224), (225, 224), (223, 300), (37, 51), (640, 481), (333, 999), (481, 960)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_noise_of_any_size_is_within_one_level_of_pillow(height: int, width: int) -> None:
    assert levels_apart(noise(height, width), spec(224)).max() < 1.01


# None of them takes two passes in Pillow 13's other order.
@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 100), (300, 900), (300, 224), (500, 400)])
def test_stretched_images_are_within_one_level_of_pillow(height: int, width: int) -> None:
    assert (
        levels_apart(
            noise(height, width), torchvision_image_spec(224, "bicubic", "after_crop", MEAN, STD, "stretch")
        ).max()
        < 1.01
    )


def test_every_rounding_of_the_crop_and_other_steps_are_within_one_level_of_pillow() -> None:
    rounded_down = replace(spec(32), crop="down", transparency="white", rgb_stage="before_resize")
    specs = [
        rounded_down,
        replace(rounded_down, resize_pixels=(41,), rescale_factor=1.0),
        # Higher than the images: the horizontal pass comes first in Pillow 13 too, see `test_tall_images`.
        replace(rounded_down, resize="stretch", resize_pixels=(47, 35)),
    ]
    for size in ((40, 40), (40, 41), (40, 42), (40, 43), (43, 40), (32, 35), (35, 32)):
        for image_spec in specs:
            apart = levels_apart(noise(*size), image_spec) / image_spec.rescale_factor / 255
            assert apart.max() < 1.01, (size, image_spec)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resample": "lanczos"}, "resample lanczos"),
        ({"resize": "none", "resize_pixels": ()}, "no resize"),
        ({"crop": "none"}, "no crop"),
        ({"resize_pixels": (31,)}, "pads"),
    ],
)
def test_steps_that_the_graph_lacks_are_named(changes: dict[str, Any], says: str) -> None:
    assert unsupported_steps(spec(32)) == []
    (reason,) = unsupported_steps(replace(spec(32), **changes))
    assert says in reason


@pytest.mark.parametrize("size", [1, 5, 16, 17])
def test_few_kept_pixels_are_within_one_level_of_pillow(size: int) -> None:
    for height, width in ((3, 4), (40, 30), (300, 400)):
        assert levels_apart(noise(height, width), spec(size)).max() < 1.01


@pytest.mark.parametrize(("resample", "levels", "share"), [("bilinear", 1.01, 0.28), ("bicubic", 22.01, 0.32)])
def test_tall_images(resample: Literal["bicubic", "bilinear"], levels: float, share: float) -> None:
    """Pillow 13 takes the vertical pass first when more than twice as many rows as columns vanish.

    In the order of the installed Pillow, ours or that of the transposed image, they are as near as all others. Else
    bicubic passes that overshoot are cut to 0 to 255 at other places; the bounds are just above what was measured.
    """
    photograph = synthetic_photographs()[1]
    images = [photograph.resize((300, 700)), photograph.resize((230, 500)), noise(1000, 250), noise(700, 300)]
    for image in images:
        apart = levels_apart(image, spec(224, resample))
        assert apart.max() < levels
        assert (apart > 0.5).mean() < share
        other_order = levels_apart(image, spec(224, resample), vertical_first=True)
        assert min(apart.max(), other_order.max()) < 1.01


def test_rows_of_a_batch_are_independent() -> None:
    module = PreprocessedVision(spec(32), torch.nn.Identity()).eval()
    images = torch.from_numpy(np.stack([np.asarray(noise(40, 50)), np.asarray(noise(40, 50).rotate(180))]))
    together = module(images)
    assert torch.equal(together[1], module(images[1:])[0])


def test_a_wrong_filter_is_far_off() -> None:
    image = synthetic_photographs()[0].convert("RGB")
    module = PreprocessedVision(spec(64, "bilinear"), torch.nn.Identity()).eval()
    found = module(torch.from_numpy(np.asarray(image).copy())[None]).numpy()[0]
    assert np.abs(found - preprocess_image(image, spec(64))).max() * 0.26 * 255 > 3
