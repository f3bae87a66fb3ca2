"""Images as a vision part takes them, whole or cut into tiles, and the features that it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import batches
from vlm_export.runtime.inputs.images import FloatArray, ImageSource, preprocess_image
from vlm_export.runtime.inputs.sources import Unreadable, map_images
from vlm_export.runtime.inputs.tiles import Grid, cut_tiles
from vlm_export.runtime.session import Session
from vlm_export.specs import AnyImageSpec, ImageSpec, PatchSpec, SliceSpec, TileSpec

PIXELS = "pixel_values"
TILE_BATCH_SIZE = 4
"""Tiles in one run of the vision part: attention over a tile of 512 pixels takes 50 MB for each."""


class PreparedImage(NamedTuple):
    """An image's grid, and its tiles float32 (tiles, 3, S, S); (1, 1) and one for an image that is not cut.

    Where the part takes patches, that one is (1, 3, H, W).
    """

    grid: Grid
    tiles: FloatArray


def prepare_image(image: Image.Image, spec: AnyImageSpec, name: str) -> PreparedImage:
    """One image by its spec.

    Raises:
        InputError: it cannot be prepared (the message names it), or the spec cuts slices, whose sizes differ.
    """
    if isinstance(spec, ImageSpec | PatchSpec):
        return PreparedImage((1, 1), preprocess_image(image, spec, name=name)[None])
    if isinstance(spec, TileSpec):
        plan, tiles = cut_tiles(image, spec, name=name)
        return PreparedImage(plan.grid, tiles)
    raise InputError(
        "this bundle cuts images into slices of several sizes",
        where=name,
        expected="a bundle that takes whole images or tiles",
        got=SliceSpec.__name__,
        fix="use encode_slices; `vlm-export embed` writes the features",
    )


def prepare_images(
    session: Session,
    part: str,
    sources: Sequence[ImageSource],
    decoders: ThreadPoolExecutor,
    *,
    first: int = 0,
    unreadable: Unreadable | None = None,
) -> list[PreparedImage]:
    """Images as that part takes them, in the order of the sources.

    Args:
        first: the number of the first source, in the names of images that have no path.
        unreadable: as in `map_images`.

    Raises:
        InputError: an image is unreadable or too large; the message names it.
    """
    spec = session.image_spec
    if sources:
        # The graph first: it shows whether it takes images of this size, before they are made that large.
        session.engine(part)
    return map_images(
        lambda image, name: prepare_image(image, spec, name),
        sources,
        decoders,
        max_pixels=session.max_pixels,
        first=first,
        unreadable=unreadable,
    )


def image_features(session: Session, part: str, output: str, images: Sequence[PreparedImage]) -> list[FloatArray]:
    """Features of each image, float32 (tiles, L, D); all tiles share batches.

    Raises:
        InputError: the graph returns another number of rows.
    """
    if not images:
        return []
    tiles = np.concatenate([image.tiles for image in images])
    runs = []
    for batch in batches(range(len(tiles)), TILE_BATCH_SIZE):
        features: FloatArray = session.run(part, {PIXELS: tiles[list(batch)]})[output]
        if features.ndim != 3 or len(features) != len(batch):
            raise InputError(
                "a graph returned no features per tile",
                where=f"part {part}: {output}",
                expected=f"({len(batch)}, L, D)",
                got=str(features.shape),
                fix="export the bundle again",
            )
        runs.append(features)
    ends = np.cumsum([len(image.tiles) for image in images])[:-1]
    return np.split(np.concatenate(runs), ends)
