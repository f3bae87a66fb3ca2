"""Image preprocessing as the originals compute it, for the reference side: independent of the runtime's."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_export.bundle.layout import preprocessor_config
from vlm_export.proof.metrics import Array
from vlm_export.specs import ImageSpec
from vlm_export.specs.slices import SliceSpec
from vlm_export.specs.tiles import TileSpec

if TYPE_CHECKING:
    from PIL import Image

    from vlm_export.runtime.inputs.slice_plan import SlicePlan
    from vlm_export.runtime.inputs.tiles import TilePlan


def original_pixel_values(image: Image.Image, spec: ImageSpec) -> Array:
    """float32 (3, S, S), normalised: by transformers' processor where it is the original's, else by torchvision.

    transformers alone puts transparency on white. Its processor reads what the bundle's `preprocessor_config.json`
    says. Otherwise: `_transform` in openai/CLIP clip.py (d05afc4) and in open_clip 3.3.0; of stretched images
    `load_demo_image` in salesforce/BLIP demo.ipynb and the test transform in data/__init__.py (056a169).
    """
    if spec.transparency == "white":
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


def _transformers_pixel_values(image: Image.Image, spec: ImageSpec) -> Array:
    transformers = import_module("transformers")
    config = preprocessor_config(spec)
    kind = getattr(transformers, f"{config['image_processor_type']}Pil")
    pixel_values: Array = kind(**config)(images=[image], return_tensors="np")["pixel_values"][0]
    return pixel_values


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
