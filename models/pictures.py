"""What the families share about pictures: the normalisation of CLIP and its successors, examples, other sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from torch import nn

from vlm_export.errors import InputError, UsageError
from vlm_export.family import Array, BuildOptions, Checkpoint
from vlm_export.models.vit import VisionTransformer
from vlm_export.signature import Axis, Signature

# openai/CLIP clip.py (d05afc4); BLIP normalises with the same numbers.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# Patches per side up to which a dynamic image size goes; attention is quadratic in their square.
LARGEST_GRID = 64
Channels = tuple[float, float, float]


class PictureExamples:
    """Normalised noise: every pixel independent, about the range of real normalised pictures."""

    def __init__(self, signature: Signature) -> None:
        self.spec = signature.inputs[0]

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {self.spec.name: rng.standard_normal(self.spec.concrete_shape(sizes), dtype=np.float32)}


def picture_shape(
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
    patch = vision.form.patch_size
    if options.image_size is not None:
        if options.image_size < patch or options.image_size % patch:
            raise UsageError(
                "the image size is not a multiple of the patch size",
                expected=f"a multiple of {patch}",
                got=str(options.image_size),
            )
        vision.resize(options.image_size)
    vision.dynamic_image_size = options.dynamic_image_size
    return options.image_size or image_size


def published_normalisation(checkpoint: Checkpoint) -> tuple[Channels, Channels]:
    """Mean and standard deviation from `preprocessor_config.json`, or OpenAI's."""
    path = checkpoint.side_files.get("preprocessor_config.json")
    if path is None:
        return IMAGE_MEAN, IMAGE_STD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        red, green, blue = (float(value) for value in data.get("image_mean", IMAGE_MEAN))
        std_red, std_green, std_blue = (float(value) for value in data.get("image_std", IMAGE_STD))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            "preprocessor_config.json is malformed",
            where=str(path),
            expected="image_mean and image_std, three numbers each",
        ) from error
    return (red, green, blue), (std_red, std_green, std_blue)
