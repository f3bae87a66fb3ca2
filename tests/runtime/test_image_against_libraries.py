"""Preprocessing against torchvision and transformers themselves, on more sizes than are recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_export.runtime.image import open_image, preprocess_image
from vlm_export.specs import ImageSpec
from vlm_export.verify.original_image import original_pixel_values

pytestmark = pytest.mark.needs_torch

SPEC = ImageSpec(32, "bicubic", "after_crop", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MODES = ("RGB", "L", "LA", "RGBA", "CMYK", "YCbCr", "P", "1", "I", "F", "I;16")


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        values = rng.integers(0, 700, (height, width))
        return Image.fromarray(values.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "P":
        return rgb.quantize(19)
    image = rgb.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_torchvision_on_random_sizes(mode: str) -> None:
    from torchvision import transforms

    original = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    rng = np.random.default_rng(len(mode))
    for seed in range(12):
        width, height = (int(edge) for edge in rng.integers(1, 120, 2))
        image = picture(mode, width, height, seed)
        assert image.mode == mode
        assert np.abs(preprocess_image(image, SPEC) - original(image).numpy()).max() <= 1e-6, (mode, width, height)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [32, 33])
def test_every_mode_squashes_as_torchvision_does(mode: str, size: int) -> None:
    """salesforce/BLIP (056a169): convert to RGB, then Resize to both edges."""
    from torchvision import transforms

    resize = transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(SPEC.mean, SPEC.std)])
    rng = np.random.default_rng(size + len(mode))
    sizes = [(1, 1), (1, 97), (97, 1), (size, size), (size, 7), *rng.integers(1, 120, (6, 2)).tolist()]
    for seed, (width, height) in enumerate(sizes):
        image = picture(mode, width, height, seed)
        before = ImageSpec(size, "bicubic", "before_resize", SPEC.mean, SPEC.std, "squash")
        after = dataclasses.replace(before, rgb_stage="after_crop")
        for spec, expected in (
            (before, finish(resize(image.convert("RGB")))),
            (after, finish(resize(image).convert("RGB"))),
        ):
            for ours in (preprocess_image(image, spec), original_pixel_values(image, spec)):
                assert np.abs(ours - expected.numpy()).max() <= 1e-6, (mode, width, height, spec.rgb_stage)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 32), (32, 46), (33, 32), (120, 200), (7, 7), (32, 37)])
def test_transformers_processor_agrees(mode: str, width: int, height: int) -> None:
    """Both crop the same square when the surplus is even, or odd with its half rounding down.

    They differ on transparency, which transformers 5 blends with white and the original drops.
    """
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(mode, width, height, 0)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    spec = ImageSpec(32, "bicubic", "before_resize", SPEC.mean, SPEC.std)
    assert np.abs(preprocess_image(image, spec) - expected).max() <= 1e-6
    if mode in ("RGB", "L"):
        assert np.abs(preprocess_image(image, SPEC) - expected).max() <= 1e-6


def test_transformers_processor_agrees_on_the_recorded_picture(data: Path) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    image = open_image(data / "clip" / "vit_w128" / "image.png")
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(preprocess_image(image, dataclasses.replace(SPEC, size_pixels=30)) - expected).max() <= 1e-6


def test_transformers_blends_transparency_with_white(data: Path) -> None:
    """The known difference, so that a change on either side is noticed."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture("RGBA", 64, 64, 0)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(preprocess_image(image, SPEC) - expected).max() > 0.1
