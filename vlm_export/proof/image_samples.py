"""One image as a part takes it, prepared twice: by the runtime, and by the original's own pipeline.

Where a model cuts images, the slices or tiles of one go through the part a few at a time, as in the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeAlias

import numpy as np
from PIL import Image

from vlm_export.proof.metrics import Array
from vlm_export.proof.original_image import original_pixel_values, original_slices, original_tiles
from vlm_export.proof.points import Arrays
from vlm_export.runtime.engines.runs import batches
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.runtime.inputs.patches import pack_patches, patch_length
from vlm_export.runtime.inputs.slices import slice_image, stack_patches, whole_patches
from vlm_export.runtime.inputs.tiles import cut_tiles
from vlm_export.specs import AnyImageSpec, ImageSpec, PatchSpec, SliceSpec, TileSpec
from vlm_export.specs.patches import PATCH_INPUTS
from vlm_export.specs.signature import Signature

Both: TypeAlias = tuple[Arrays, Arrays]
"""Inputs by the runtime's preparation, and by the original's."""

PIXELS, SIZES, RAW = "pixel_values", "tgt_sizes", "pixels"
# Two share a run: with patches in rows, they differ in shape.
_TOGETHER = 2


def takes_images(signature: Signature) -> bool:
    """Whether a part starts from pixels."""
    return bool({PIXELS, RAW} & set(signature.input_names))


def prepared_twice(
    image: Image.Image, signature: Signature, spec: AnyImageSpec | None, limit: int | None = None
) -> Iterator[Both]:
    """Inputs of a part for one image: one pair, or several where it is cut; none for a part without images.

    Args:
        limit: most slices or tiles, None for all; the whole image comes first.

    Raises:
        InputError: the image is too long and thin, or cannot be converted.
    """
    names = signature.input_names
    if names == (RAW,):
        pixels = {RAW: np.array(image.convert("RGB"))[None]}
        yield pixels, pixels
    elif names == (PIXELS,) and isinstance(spec, ImageSpec):
        yield {PIXELS: preprocess_image(image, spec)[None]}, {PIXELS: original_pixel_values(image, spec)[None]}
    elif names == PATCH_INPUTS and isinstance(spec, PatchSpec):
        length = patch_length([signature])
        both = preprocess_image(image, spec), original_pixel_values(image, spec)
        yield pack_patches(both[:1], spec, length), pack_patches(both[1:], spec, length)
    elif names == (PIXELS,) and isinstance(spec, TileSpec):
        plan, tiles = cut_tiles(image, spec)
        pairs = list(zip(tiles, original_tiles(image, spec, plan), strict=True))[:limit]
        for ours, theirs in _few_of_one_shape(pairs):
            yield {PIXELS: np.stack(ours)}, {PIXELS: np.stack(theirs)}
    elif names in ((PIXELS,), (PIXELS, SIZES)) and isinstance(spec, SliceSpec):
        yield from _slices(image, spec, limit)


def _slices(image: Image.Image, spec: SliceSpec, limit: int | None) -> Iterator[Both]:
    cut = slice_image(image, spec)
    pairs = list(zip(cut.pixel_values, original_slices(image, spec, cut.plan), strict=True))[:limit]
    if spec.pixel_layout == "image":
        for ours, theirs in _few_of_one_shape(pairs):
            yield (
                {PIXELS: whole_patches(np.stack(ours), spec.patch_size)},
                {PIXELS: whole_patches(np.stack(theirs), spec.patch_size)},
            )
        return
    # Rows of patches share a run whatever the slices' shapes.
    for rows in map(list, batches(range(len(pairs)), _TOGETHER)):
        ours, theirs = zip(*(pairs[i] for i in rows), strict=True)
        sizes = cut.tgt_sizes[rows]
        yield {PIXELS: stack_patches(ours), SIZES: sizes}, {PIXELS: stack_patches(theirs), SIZES: sizes}


def _few_of_one_shape(pairs: Sequence[tuple[Array, Array]]) -> Iterator[tuple[tuple[Array, ...], tuple[Array, ...]]]:
    for _, same in groupby(pairs, key=lambda pair: pair[0].shape):
        group = list(same)
        for rows in batches(range(len(group)), _TOGETHER):
            ours, theirs = zip(*(group[i] for i in rows), strict=True)
            yield ours, theirs
