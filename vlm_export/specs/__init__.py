"""What a family states and a manifest carries, as typed data: how inputs are prepared, signatures, and tasks."""

from typing import TypeAlias

from vlm_export.specs.image import (
    MAX_IMAGE_SIZE_PIXELS,
    Crop,
    ImageSpec,
    Resample,
    Resize,
    RgbStage,
    Transparency,
    torchvision_image_spec,
)
from vlm_export.specs.origins import Origins
from vlm_export.specs.patches import PatchSpec
from vlm_export.specs.slices import SliceSpec
from vlm_export.specs.text import Side, TextCase, TextCleaning, TextPadding, TextPooling, TextSpec
from vlm_export.specs.tiles import TileSpec

AnyImageSpec: TypeAlias = ImageSpec | PatchSpec | TileSpec | SliceSpec
"""How images become the inputs of a vision part: whole, as rows of patches, as square tiles, or as slices."""

__all__ = [
    "MAX_IMAGE_SIZE_PIXELS",
    "AnyImageSpec",
    "Crop",
    "ImageSpec",
    "Origins",
    "PatchSpec",
    "Resample",
    "Resize",
    "RgbStage",
    "Side",
    "SliceSpec",
    "TextCase",
    "TextCleaning",
    "TextPadding",
    "TextPooling",
    "TextSpec",
    "TileSpec",
    "Transparency",
    "torchvision_image_spec",
]
