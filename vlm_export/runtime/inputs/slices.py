"""Images to slices, as MiniCPM-V and OmniLMM cut, resize and normalise them; `slice_plan` decides where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.slice_plan import SlicePlan, plan_slices
from vlm_export.specs.slices import SliceSpec

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slices:
    """One image's inputs of the vision part.

    Attributes:
        plan: where they come from.
        pixel_values: per slice float32 (3, H, W), or (3, p, p * L) in the layout "patches".
        tgt_sizes: int64 (slices, 2), rows and columns of patches.
    """

    plan: SlicePlan
    pixel_values: tuple[FloatArray, ...]
    tgt_sizes: IntArray


def slice_image(image: Image.Image, spec: SliceSpec, *, max_patches: int | None = None, name: str = "image") -> Slices:
    """Convert, resize, cut and normalise one source.

    Args:
        image: opened by `open_image`, which bounds its pixels.
        max_patches: see `plan_slices`.

    Raises:
        InputError: `plan_slices` refuses the source, or Pillow cannot convert it to RGB.
    """
    plan = plan_slices(image.size, spec, max_patches=max_patches, name=name)
    images = _cut(rgb_image(image, name=name), plan)
    arrays = (_normalise(source, spec) for source in images)
    if spec.pixel_layout == "patches":
        arrays = (patchify(array, spec.patch_size) for array in arrays)
    return Slices(plan, tuple(arrays), np.asarray(plan.patch_grids, dtype=np.int64))


def rgb_image(image: Image.Image, *, name: str = "image") -> Image.Image:
    """The image in mode RGB; InputError when Pillow cannot convert it."""
    try:
        return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise machine_fault(error, name) or InputError(
            "an image cannot be converted to RGB",
            where=name,
            expected="an image that Pillow converts",
            got=f"mode {image.mode}: {error}",
        ) from error


def patchify(pixels: FloatArray, patch_size: int) -> FloatArray:
    """(3, H, W) to (3, p, p * L): the patches, row by row, side by side.

    The order of torch's `unfold` as the originals rearrange it. H and W must be multiples of p.
    """
    channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    split = pixels.reshape(channels, rows, patch_size, columns, patch_size)
    strip = split.transpose(0, 2, 1, 3, 4).reshape(channels, patch_size, rows * columns * patch_size)
    patches: FloatArray = np.ascontiguousarray(strip)
    return patches


def stack_patches(slices: Sequence[FloatArray]) -> FloatArray:
    """A batch (B, 3, p, p * L) of slices in the layout "patches", those shorter than the longest L padded with zeros.

    Raises:
        InputError: there are no slices.
    """
    if not slices:
        raise InputError("a batch needs at least one slice")
    longest = max(array.shape[-1] for array in slices)
    batch = np.zeros((len(slices), *slices[0].shape[:-1], longest), dtype=np.float32)
    for row, array in zip(batch, slices, strict=True):
        row[..., : array.shape[-1]] = array
    return batch


def _cut(image: Image.Image, plan: SlicePlan) -> Iterator[Image.Image]:
    yield image.resize(plan.source_size, Image.Resampling.BICUBIC)
    if plan.refined_size is not None:
        refined = image.resize(plan.refined_size, Image.Resampling.BICUBIC)
        yield from (refined.crop(box) for box in plan.boxes)


def _normalise(image: Image.Image, spec: SliceSpec) -> FloatArray:
    pixels = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean = np.asarray(spec.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(spec.std, dtype=np.float32)[:, None, None]
    normalised: FloatArray = np.ascontiguousarray((pixels - mean) / std)
    return normalised


def whole_patches(pixels: FloatArray, patch_size: int) -> FloatArray:
    """(B, 3, H, W), with zeros below and on the right up to multiples of the patch, as timm pads squares."""
    height, width = pixels.shape[2:]
    return np.pad(pixels, ((0, 0), (0, 0), (0, -height % patch_size), (0, -width % patch_size)))
