"""Pixels of slices equal the originals' within 1e-6."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.models.minicpmv.slicing import slice_spec_from_version
from vlm_export.runtime.inputs.images import open_image
from vlm_export.runtime.inputs.slices import patchify, slice_image, stack_patches
from vlm_export.specs.slices import SliceSpec

FOLDER = Path(__file__).parents[2] / "data" / "minicpmv"
MAX_SLICES: dict[str, int] = json.loads((FOLDER / "preprocess" / "meta.json").read_text("utf-8"))["pixel_config"][
    "max_slice_nums"
]
DTYPES = {"F32": "<f4", "I64": "<i8"}


def recorded(folder: str) -> dict[str, npt.NDArray[Any]]:
    """The float32 and int64 tensors of a record, by safetensors' own rules: a length, a JSON header, raw bytes."""
    raw = (FOLDER / folder / "golden.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if entry.get("dtype") in DTYPES:
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(raw[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def spec_of(version: str, size_pixels: int = 56, max_slices: int = 9) -> SliceSpec:
    return slice_spec_from_version(version, queries=4, size_pixels=size_pixels, max_slices=max_slices)


def assert_close(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-6


@pytest.mark.parametrize("stem", ["wide", "small"])
@pytest.mark.parametrize("version", sorted(MAX_SLICES))
def test_slices_equal_the_record(version: str, stem: str) -> None:
    expected = recorded("preprocess")
    image = open_image(FOLDER / "preprocess" / f"{stem}.png")
    slices = slice_image(image, spec_of(version, 56, MAX_SLICES[version]))
    names = sorted(name for name in expected if name.startswith(f"{version}.{stem}.slice"))
    assert len(slices.pixel_values) == len(names) > 0
    for got, name in zip(slices.pixel_values, names, strict=True):
        assert_close(got, expected[name])
    assert slices.tgt_sizes.dtype == np.int64
    assert np.array_equal(slices.tgt_sizes, expected[f"{version}.{stem}.tgt_sizes"])


@pytest.mark.parametrize(("folder", "version"), [("v1_0", "1.0"), ("omnilmm", "omnilmm")])
def test_squares_equal_the_record(folder: str, version: str) -> None:
    edge = json.loads((FOLDER / folder / "config.json").read_text("utf-8"))["image_size"]
    slices = slice_image(open_image(FOLDER / folder / "image.png"), spec_of(version, edge))
    (got,) = slices.pixel_values
    assert_close(got, recorded(folder)["preprocess.pixel_values"])
    assert slices.tgt_sizes.tolist() == [[edge // 14, edge // 14]]


def test_patches_stand_side_by_side_row_by_row() -> None:
    pixels = np.arange(3 * 28 * 42, dtype=np.float32).reshape(3, 28, 42)
    strip = patchify(pixels, 14)
    assert strip.shape == (3, 14, 6 * 14)
    for patch in range(6):
        top, left = patch // 3 * 14, patch % 3 * 14
        expected = pixels[:, top : top + 14, left : left + 14]
        assert np.array_equal(strip[:, :, patch * 14 : (patch + 1) * 14], expected)


def test_both_layouts_hold_the_same_pixels() -> None:
    image = open_image(FOLDER / "preprocess" / "wide.png")
    pixels = slice_image(image, spec_of("2.0")).pixel_values
    patches = slice_image(image, spec_of("2.5")).pixel_values
    assert all(np.array_equal(patchify(a, 14), b) for a, b in zip(pixels, patches, strict=True))


def test_batches_are_padded_with_zeros() -> None:
    short, long = np.ones((3, 14, 28), dtype=np.float32), np.full((3, 14, 70), 2, dtype=np.float32)
    batch = stack_patches([short, long])
    assert batch.shape == (2, 3, 14, 70)
    assert np.array_equal(batch[0, :, :, :28], short)
    assert not batch[0, :, :, 28:].any()
    assert np.array_equal(batch[1], long)
    with pytest.raises(InputError, match="at least one slice"):
        stack_patches([])


def test_images_become_rgb_before_they_are_resized(data: Path) -> None:
    palette = open_image(data / "runtime" / "images" / "palette.png")
    assert palette.mode == "P"
    got, expected = (slice_image(image, spec_of("2.6")) for image in (palette, palette.convert("RGB")))
    assert all(np.array_equal(a, b) for a, b in zip(got.pixel_values, expected.pixel_values, strict=True))


@pytest.mark.parametrize("version", ["1.0", "omnilmm", "2.0", "2.6"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_tiny_and_thin_images_stay_one_colour(version: str, size: tuple[int, int]) -> None:
    spec = spec_of(version, 448)
    slices = slice_image(Image.new("RGB", size, (255, 0, 128)), spec)
    colour = (np.array([255, 0, 128]) / 255 - spec.mean) / spec.std
    for pixels in slices.pixel_values:
        assert np.abs(pixels - colour[:, None, None]).max() <= 1e-6


def test_an_image_of_ten_thousand_pixels_in_one_column() -> None:
    slices = slice_image(Image.new("L", (1, 10_000), 7), spec_of("2.6", 448))
    assert slices.tgt_sizes.tolist() == [[3200, 1]]
    assert slices.pixel_values[0].shape == (3, 14, 44_800)


def test_images_that_pillow_cannot_convert_are_refused() -> None:
    class Odd(Image.Image):
        def convert(self, *args: Any, **options: Any) -> Image.Image:
            raise ValueError("conversion not supported")

    image = Odd()
    image._size = (40, 30)
    with pytest.raises(InputError, match="cannot be converted") as caught:
        slice_image(image, spec_of("2.6"), name="odd.tiff")
    assert caught.value.where == "odd.tiff"


def test_the_bound_on_patches_reaches_the_plan() -> None:
    with pytest.raises(InputError, match="too long and thin"):
        slice_image(Image.new("RGB", (40, 30)), spec_of("2.6"), max_patches=3)
