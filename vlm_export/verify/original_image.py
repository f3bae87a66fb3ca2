"""Image preprocessing as the originals compute it, for the reference side: independent of the runtime's."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_export.specs import ImageSpec
from vlm_export.verify.metrics import Array

if TYPE_CHECKING:
    from PIL import Image


def original_pixel_values(image: Image.Image, spec: ImageSpec) -> Array:
    """float32 (3, S, S), normalised, by torchvision on a Pillow picture.

    Source: `_transform` in openai/CLIP clip.py (d05afc4); transformers' CLIPImageProcessor converts to RGB first.
    "squash": `load_demo_image` in salesforce/BLIP demo.ipynb and the test transform in data/__init__.py (056a169).
    """
    transforms = import_module("torchvision.transforms")  # carries no types

    def convert(picture: Any) -> Any:
        return picture.convert("RGB")

    size, filter_ = spec.size_pixels, transforms.InterpolationMode(spec.resample)
    if spec.fit == "squash":
        cut = [transforms.Resize((size, size), interpolation=filter_)]
    else:
        cut = [transforms.Resize(size, interpolation=filter_), transforms.CenterCrop(size)]
    ordered = [convert, *cut] if spec.rgb_stage == "before_resize" else [*cut, convert]
    pipeline = transforms.Compose([*ordered, transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    pixel_values: Array = pipeline(image).numpy()
    return pixel_values
