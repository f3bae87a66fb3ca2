"""What the families share about images: the normalisation of CLIP and its successors, examples, other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from vlm_export.errors import UsageError
from vlm_export.family import Array, BuildOptions
from vlm_export.models.layers.vit import VisionTransformer
from vlm_export.specs.signature import Axis, Signature

# openai/CLIP clip.py (d05afc4); BLIP normalises with the same numbers.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# Patches per side up to which a dynamic image size goes; attention is quadratic in their square.
LARGEST_GRID = 64
# The same for a size that the user chose: four times the patches per side of any published encoder.
LARGEST_FIXED_GRID = 256
Channels = tuple[float, float, float]


class ImageExamples:
    """Normalised noise: every pixel independent, about the range of real normalised images."""

    def __init__(self, signature: Signature) -> None:
        self.spec = signature.inputs[0]

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {self.spec.name: rng.standard_normal(self.spec.concrete_shape(sizes), dtype=np.float32)}


def image_shape(
    image_size: int, patch_size: int, dynamic_image_size: bool
) -> tuple[tuple[int | str, ...], tuple[Axis, ...]]:
    """Shape of `pixel_values`, and its axes besides the batch."""
    if not dynamic_image_size:
        return ("batch", 3, image_size, image_size), ()
    largest = LARGEST_GRID * patch_size
    axes = Axis("height", patch_size, largest, patch_size), Axis("width", patch_size, largest, patch_size)
    return ("batch", 3, "height", "width"), axes


def apply_image_size(vision: nn.Module, image_size: int, options: BuildOptions) -> int:
    """Makes the image encoder take the size that the options ask for; returns the edge that it has now.

    Raises:
        UsageError: the size is no multiple of the patch size, or the encoder takes no other size than its own.
    """
    if options.image_size is None and not options.dynamic_image_size:
        return image_size
    if not isinstance(vision, VisionTransformer):
        raise UsageError(
            "only a ViT takes another image size", got=type(vision).__name__, fix="leave the size options out"
        )
    if options.image_size is not None:
        _check_image_size(options.image_size, vision.form.patch_size)
        vision.resize(options.image_size)
    vision.dynamic_image_size = options.dynamic_image_size
    return options.image_size or image_size


def config_of_size(config: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """A `config.json` that states the size that the image encoder has now; None without one."""
    vision = config.get("vision_config")
    if image_size is None or not isinstance(vision, Mapping) or vision.get("image_size", image_size) == image_size:
        return dict(config)
    return {**config, "vision_config": {**vision, "image_size": image_size}}


def _check_image_size(size: int, patch: int) -> None:
    if not patch <= size <= LARGEST_FIXED_GRID * patch or size % patch:
        raise UsageError(
            "the image size is not a multiple of the patch size, or not usable",
            expected=f"a multiple of {patch}, at most {LARGEST_FIXED_GRID * patch}",
            got=str(size),
        )
