"""Images to the tiles that nanoVLM's later generation looks at.

The image is resized to whole tiles and cut row by row; of more than one tile, the whole image at a tile's size goes
first. The arithmetic is that of `DynamicResize` and `GlobalAndSplitImages` in huggingface/nanoVLM
(data/custom_transforms.py, 4e0c096): float division and `math.ceil`, Pillow's bicubic on the 8-bit image, and for the
global tile torchvision's antialiased bilinear on the resized image as floats, which Pillow's mode F computes too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.images import MAX_RESIZED_PIXELS, FloatArray
from vlm_export.runtime.inputs.slices import rgb_image
from vlm_export.specs.tiles import TileSpec

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of tiles."""


@dataclass(frozen=True)
class TilePlan:
    """How one image is cut; sizes are (width, height) in pixels.

    Attributes:
        image_size: of the image itself.
        resized_size: of what is cut.
        grid: rows and columns of tiles.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    grid: Grid

    def to_json(self) -> dict[str, Any]:
        """What `inspect` prints."""
        rows, columns = self.grid
        return {
            "size": list(self.image_size),
            "resized": list(self.resized_size),
            "grid": {"rows": rows, "columns": columns},
        }


def plan_tiles(
    size: tuple[int, int],
    spec: TileSpec,
    *,
    max_resized_pixels: int = MAX_RESIZED_PIXELS,
    name: str = "image",
) -> TilePlan:
    """Decide how an image of `size` (width, height) is cut.

    Where the float that should be a whole number of tiles lies just above it, the shorter side gets one tile more, as
    in the original: (187, 187) with tiles of 512 and sides of 1536 becomes 4 x 3.

    Raises:
        InputError: the image has no pixels, or is so long and thin that resizing it exceeds the bound.
    """
    if min(size) < 1:
        raise InputError("an image has no pixels", where=name, got=f"{size[0]} x {size[1]}")
    longer, shorter, edge = max(size), min(size), spec.tile_size_pixels
    target = spec.max_side_pixels
    if not spec.resize_to_max_side:
        target = min(target, math.ceil(longer / edge) * edge)
    scale = target / longer
    other = max(math.ceil(shorter * scale / edge) * edge, edge)
    # Between Pillow's two passes the longer side may still have its own length.
    if longer * other > max_resized_pixels:
        raise InputError(
            "an image is too long and thin to resize",
            where=name,
            expected=f"at most {max_resized_pixels:,} pixels while resizing",
            got=f"{size[0]} x {size[1]} would take {longer} x {other}",
            fix="crop it nearer to a square",
        )
    width, height = (target, other) if size[0] >= size[1] else (other, target)
    return TilePlan(size, (width, height), (height // edge, width // edge))


def cut_tiles(image: Image.Image, spec: TileSpec, *, name: str = "image") -> tuple[TilePlan, FloatArray]:
    """The plan of one image, and its tiles; where there are several and the spec says so, the whole image first.

    Args:
        image: opened by `open_image`, which bounds its pixels.

    Returns:
        float32 (N, 3, S, S) in [0, 1], S = `spec.tile_size_pixels`.

    Raises:
        InputError: `plan_tiles` refuses the image, or Pillow cannot convert it to RGB.
    """
    plan = plan_tiles(image.size, spec, name=name)
    resized = rgb_image(image, name=name).resize(plan.resized_size, Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.uint8).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    (rows, columns), edge = plan.grid, spec.tile_size_pixels
    split = pixels.reshape(3, rows, edge, columns, edge).transpose(1, 3, 0, 2, 4).reshape(-1, 3, edge, edge)
    tiles: FloatArray = np.ascontiguousarray(split)
    if spec.global_tile and len(tiles) > 1:
        tiles = np.concatenate([_shrunk(pixels, edge)[None], tiles])
    return plan, tiles


def _shrunk(pixels: FloatArray, edge: int) -> FloatArray:
    """float32 (3, H, W) as (3, edge, edge), antialiased bilinear."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((edge, edge), Image.Resampling.BILINEAR)) for channel in pixels
    ]
    return np.stack(channels)
