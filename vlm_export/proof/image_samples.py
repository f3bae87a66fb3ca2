"""One image as a part takes it, prepared twice: by the runtime, and by the original's own pipeline.

Where a model cuts images, the slices or tiles of one go through the part a few at a time, as in the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vlm_export.bundle.layout import preprocessor_config
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays
from vlm_export.runtime.engines.onnxruntime import batches
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.runtime.inputs.patches import pack_patches, patch_length, whole_image
from vlm_export.runtime.inputs.slice_plan import SlicePlan
from vlm_export.runtime.inputs.slices import slice_image, stack_patches, whole_patches
from vlm_export.runtime.inputs.tiles import TilePlan, cut_tiles
from vlm_export.specs import AnyImageSpec, ImageSpec, PatchSpec, SliceSpec, TileSpec
from vlm_export.specs.patches import PATCH_INPUTS, PIXELS, SHAPES
from vlm_export.specs.signature import Signature

Both: TypeAlias = tuple[Arrays, Arrays]
"""Inputs by the runtime's preparation, and by the original's."""
SIZES, RAW = "tgt_sizes", "pixels"
# Two share a run: with patches in rows, they differ in shape.
_TOGETHER = 2


def original_pixel_values(image: Image.Image, spec: ImageSpec | PatchSpec) -> Array:
    """float32 (3, S, S), or (3, H, W) of whole patches: by transformers' processor where it is the original's.

    transformers alone puts transparency on white. Its processor reads what the bundle's `preprocessor_config.json`
    says. Otherwise: `_transform` in openai/CLIP clip.py (d05afc4) and in open_clip 3.3.0; of stretched images
    `load_demo_image` in salesforce/BLIP demo.ipynb and the test transform in data/__init__.py (056a169).
    """
    if isinstance(spec, PatchSpec) or spec.transparency == "white":
        return _transformers_pixel_values(image, spec)
    transforms = import_module("torchvision.transforms")  # carries no types

    def convert(source: Any) -> Any:
        return source.convert("RGB")

    filter_ = transforms.InterpolationMode(spec.resample)
    size: Any = spec.resize_pixels[0] if spec.resize == "shortest_edge" else spec.resize_pixels
    cut = [] if spec.resize == "none" else [transforms.Resize(size, interpolation=filter_)]
    if spec.resize == "longest_edge":
        library = import_module("open_clip.transform")
        cut = [
            library.ResizeKeepRatio(spec.size_pixels, interpolation=filter_, longest=1),
            library.CenterCropOrPad(spec.size_pixels, fill=spec.fill),
        ]
    elif spec.crop != "none":
        cut.append(transforms.CenterCrop(spec.size_pixels))
    ordered = [convert, *cut] if spec.rgb_stage == "before_resize" else [*cut, convert]
    pipeline = transforms.Compose([*ordered, transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    pixel_values: Array = pipeline(image).numpy()
    return pixel_values


def _transformers_pixel_values(image: Image.Image, spec: ImageSpec | PatchSpec) -> Array:
    transformers = import_module("transformers")
    config = preprocessor_config(spec)
    kind = getattr(transformers, f"{config['image_processor_type']}Pil")
    return processed_pixels(kind(**config), image)


def processed_pixels(processor: Any, image: Image.Image, **options: Any) -> Array:
    """What a processor of transformers makes of an image, float32 (3, H, W); its patches put together again."""
    made = processor(images=[image], return_tensors="np", **options)
    pixels: Array = np.asarray(made[PIXELS][0], dtype=np.float32)
    if SHAPES in made:
        rows, columns = map(int, made[SHAPES][0])
        return whole_image(pixels, (rows, columns), processor.patch_size)
    return pixels


def original_slices(image: Image.Image, spec: SliceSpec, plan: SlicePlan) -> list[Array]:
    """float32 (3, H, W) or (3, p, p * L) of each slice, cut where the plan says, by torchvision and torch.

    Source: `slice_image` and the transform of MiniCPM-V 2.0's modeling file, `reshape_by_patch` of 2.5's and 2.6's.
    """
    transforms = import_module("torchvision.transforms")
    source = image.convert("RGB")
    images = [_resized(source, plan.source_size)]
    if plan.refined_size is not None:
        refined = _resized(source, plan.refined_size)
        images += [refined.crop(box) for box in plan.boxes]
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    tensors, edge = [normalise(source) for source in images], spec.patch_size
    if spec.pixel_layout == "patches":
        tensors = [_squares(tensor, edge).permute(0, 3, 1, 2, 4).reshape(3, edge, -1) for tensor in tensors]
    return [tensor.numpy() for tensor in tensors]


def original_tiles(image: Image.Image, spec: TileSpec, plan: TilePlan) -> Array:
    """float32 (N, 3, S, S) in [0, 1]: of more than one tile, the whole image first; by torchvision.

    Source: `DynamicResize` and `GlobalAndSplitImages` in huggingface/nanoVLM data/custom_transforms.py (4e0c096).
    """
    transforms, functional = import_module("torchvision.transforms"), import_module("torchvision.transforms.functional")
    pixels, edge = transforms.ToTensor()(_resized(image.convert("RGB"), plan.resized_size)), spec.tile_size_pixels
    tiles: Array = _squares(pixels, edge).permute(1, 2, 0, 3, 4).reshape(-1, 3, edge, edge).numpy()
    if len(tiles) == 1:
        return tiles
    whole: Array = functional.resize(pixels, [edge, edge], antialias=True).numpy()
    return np.concatenate([whole[None], tiles])


def _resized(image: Image.Image, size: tuple[int, int]) -> Any:
    transforms = import_module("torchvision.transforms")
    return transforms.Resize(size[::-1], interpolation=transforms.InterpolationMode.BICUBIC)(image)


def _squares(pixels: Any, edge: int) -> Any:
    """(3, H, W) as (3, rows, columns, edge, edge)."""
    return pixels.unfold(1, edge, edge).unfold(2, edge, edge)


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
