"""Preprocessing against torchvision itself, on more sizes than are recorded; `tests/models` has transformers'."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vlm_export.proof.image_samples import original_pixel_values
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import torchvision_image_spec

pytestmark = pytest.mark.needs_torch

SPEC = torchvision_image_spec(
    32, "bicubic", "after_crop", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
MODES = ("RGB", "L", "LA", "RGBA", "CMYK", "YCbCr", "P", "1", "I", "F", "I;16")


def drawn_image(mode: str, width: int, height: int, seed: int) -> Image.Image:
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
        image = drawn_image(mode, width, height, seed)
        assert image.mode == mode
        assert np.abs(preprocess_image(image, SPEC) - original(image).numpy()).max() <= 1e-6, (mode, width, height)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [32, 33])
def test_every_mode_stretches_as_torchvision_does(mode: str, size: int) -> None:
    """salesforce/BLIP (056a169): convert to RGB, then Resize to both edges."""
    from torchvision import transforms

    resize = transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(SPEC.mean, SPEC.std)])
    rng = np.random.default_rng(size + len(mode))
    sizes = [(1, 1), (1, 97), (97, 1), (size, size), (size, 7), *rng.integers(1, 120, (6, 2)).tolist()]
    for seed, (width, height) in enumerate(sizes):
        image = drawn_image(mode, width, height, seed)
        before = torchvision_image_spec(size, "bicubic", "before_resize", SPEC.mean, SPEC.std, "stretch")
        after = dataclasses.replace(before, rgb_stage="after_crop")
        for spec, expected in (
            (before, finish(resize(image.convert("RGB")))),
            (after, finish(resize(image).convert("RGB"))),
        ):
            for ours in (preprocess_image(image, spec), original_pixel_values(image, spec)):
                assert np.abs(ours - expected.numpy()).max() <= 1e-6, (mode, width, height, spec.rgb_stage)
