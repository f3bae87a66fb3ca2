"""How an image of any shape becomes rows of patches, as SigLIP 2's NaFlex does.

Source: transformers 5.23, models/siglip2/image_processing_pil_siglip2.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vlm_export.specs.codec import Spec, between
from vlm_export.specs.image import Mean, Positive, Resample

PIXELS, MASK, SHAPES = PATCH_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""Names of a part's inputs: patches, which of them are the image's, and how many rows and columns they make."""

MAX_PATCH_PIXELS = 256
MAX_PATCHES = 16384


@dataclass(frozen=True)
class PatchSpec(Spec):
    """From an image to patches: RGB, resize to whole patches that keep the aspect ratio, rescale, normalise.

    Attributes:
        patch_size: edge of a patch in pixels.
        max_patches: the image becomes as large as this number of patches allows, enlarged too.
        resample: Pillow's filter; antialiased when shrinking, but for "nearest".
        rgb_stage: "before_resize" puts transparent images on white; with "never" only images in RGB are taken.
        mean, std: per channel (R, G, B), applied to the rescaled values.
        rescale_factor: each value from 0 to 255 times this.

    Raises:
        InputError: a value is of another type or out of range.
    """

    patch_size: Annotated[int, between(1, MAX_PATCH_PIXELS)]
    max_patches: Annotated[int, between(1, MAX_PATCHES)]
    resample: Resample
    rgb_stage: Literal["before_resize", "never"]
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Positive, Positive, Positive]
    rescale_factor: Positive = 1 / 255

    @property
    def edge_pixels(self) -> int:
        """Edge of the largest square."""
        return int(self.max_patches**0.5) * self.patch_size
