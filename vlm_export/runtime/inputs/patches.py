"""Images of any shape as rows of patches: how large each becomes, and how they share a batch.

Source: transformers 5.23, models/siglip2/image_processing_pil_siglip2.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from vlm_export.specs.patches import MASK, PATCH_INPUTS, PIXELS, SHAPES, PatchSpec
from vlm_export.specs.signature import Signature

# The original looks for the largest scale between these by halving, until it is known to this.
_LEAST, _MOST, _STEP = 1e-5 / 10, 100.0, 1e-5


def patch_shape(size: tuple[int, int], spec: PatchSpec) -> tuple[int, int]:
    """(rows, columns) of patches of an image of (width, height) pixels: as many as fit, at least one each."""
    width, height = size
    least, most = _LEAST, _MOST
    while most - least >= _STEP:
        scale = (least + most) / 2
        rows, columns = (_patches(edge, scale, spec.patch_size) for edge in (height, width))
        least, most = (scale, most) if rows * columns <= spec.max_patches else (least, scale)
    return _patches(height, least, spec.patch_size), _patches(width, least, spec.patch_size)


def _patches(edge: int, scale: float, patch_size: int) -> int:
    return max(1, math.ceil(edge * scale / patch_size))


def pack_patches(
    images: Sequence[npt.NDArray[np.float32]], spec: PatchSpec, length: int | None = None
) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of a part, by name.

    Args:
        images: float32 (3, H, W), H and W multiples of the patch size.
        length: L of every row; None for the longest image's.

    Returns:
        `pixel_values` float32 (B, L, p · p · 3), each patch row by row with its channels together, zero behind the
        image's; `pixel_attention_mask` int64 (B, L); `spatial_shapes` int64 (B, 2), rows and columns.
    """
    edge = spec.patch_size
    shapes = [(image.shape[1] // edge, image.shape[2] // edge) for image in images]
    counts = [rows * columns for rows, columns in shapes]
    length = max(counts) if length is None else length
    pixels = np.zeros((len(images), length, edge * edge * 3), np.float32)
    for row, image, (rows, columns) in zip(pixels, images, shapes, strict=True):
        squares = image.reshape(3, rows, edge, columns, edge).transpose(1, 3, 2, 4, 0)
        row[: rows * columns] = squares.reshape(rows * columns, -1)
    mask = (np.arange(length) < np.array(counts)[:, None]).astype(np.int64)
    return {PIXELS: pixels, MASK: mask, SHAPES: np.array(shapes, np.int64)}


def patch_length(signatures: Iterable[Signature]) -> int | None:
    """L of the part that takes patches, where its graph has one length."""
    found = next((signature for signature in signatures if signature.input_names == PATCH_INPUTS), None)
    length = None if found is None else found.inputs[0].shape[1]
    return length if isinstance(length, int) else None


def whole_image(patches: npt.NDArray[np.float32], shape: tuple[int, int], patch_size: int) -> npt.NDArray[np.float32]:
    """The image float32 (3, H, W) whose patches float32 (L, p · p · 3) these are."""
    rows, columns = shape
    squares = patches[: rows * columns].reshape(rows, columns, patch_size, patch_size, 3)
    image: npt.NDArray[np.float32] = squares.transpose(4, 0, 2, 1, 3)
    return image.reshape(3, rows * patch_size, columns * patch_size)
