"""What the families share about pictures: the normalisation of CLIP and its successors, examples, other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.errors import InputError, UsageError
from vlm_export.family import Array, BuildOptions, Checkpoint
from vlm_export.models.shapes import check_implemented, is_number
from vlm_export.models.vit import VisionTransformer
from vlm_export.signature import Axis, Signature
from vlm_export.specs import Fit

# openai/CLIP clip.py (d05afc4); BLIP normalises with the same numbers.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# Patches per side up to which a dynamic image size goes; attention is quadratic in their square.
LARGEST_GRID = 64
# The same for a size that the user chose: four times the patches per side of any published encoder.
LARGEST_FIXED_GRID = 256
# Pillow's number of the filter, which files hold.
_BICUBIC = 3
# Means and deviations of values in [0, 1] are about 1; far from it, float32 overflows.
_LARGEST_CHANNEL = 1e6
_RESCALE_TOLERANCE = 1e-6
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
    if options.image_size is not None:
        _check_image_size(options.image_size, vision.form.patch_size)
        vision.resize(options.image_size)
    vision.dynamic_image_size = options.dynamic_image_size
    return options.image_size or image_size


def _check_image_size(size: object, patch: int) -> None:
    if type(size) is not int or not patch <= size <= LARGEST_FIXED_GRID * patch or size % patch:
        raise UsageError(
            "the image size is not a multiple of the patch size, or not usable",
            expected=f"a multiple of {patch}, at most {LARGEST_FIXED_GRID * patch}",
            got=f"{size!r:.80}",
        )


def published_normalisation(checkpoint: Checkpoint, image_size: int, fit: Fit) -> tuple[Channels, Channels]:
    """Mean and standard deviation from `preprocessor_config.json`, or OpenAI's.

    Args:
        image_size: edge of the pictures that the checkpoint's encoder takes.
        fit: how its family makes pictures square.

    Raises:
        InputError: the file is malformed, or asks for other steps than the family's published ones.
    """
    path = checkpoint.side_files.get("preprocessor_config.json")
    if path is None:
        return IMAGE_MEAN, IMAGE_STD
    data = _preprocessor_config(path)
    _check_steps(str(path), data, image_size, fit)
    mean, std = _channels(path, data, "image_mean", IMAGE_MEAN), _channels(path, data, "image_std", IMAGE_STD)
    if min(std) < 1 / _LARGEST_CHANNEL:
        raise _malformed(path, "image_std: three positive numbers", f"{std}")
    return mean, std


def _preprocessor_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return json_object_from_bytes(file.read(MAX_JSON_BYTES + 1), str(path))
    except InputError as error:
        raise _malformed(path, "a JSON object", ": ".join(filter(None, (error.what, error.got)))) from error
    except OSError as error:
        raise InputError("a file of the checkpoint cannot be read", where=str(path), got=str(error)) from error


def _check_steps(where: str, data: Mapping[str, Any], size: int, fit: Fit) -> None:
    """Old files have a number where later ones have the edges' names; a filter is Pillow's number or its name."""
    square = {"height": size, "width": size}
    steps: dict[str, tuple[Any, ...]] = {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "resample": (_BICUBIC, "bicubic"),
        "size": (size, {"shortest_edge": size} if fit == "crop" else square),
    }
    if fit == "crop":
        steps |= {"do_center_crop": (True,), "crop_size": (size, square)}
    else:
        steps["do_center_crop"] = (False,)
    check_implemented(where, data, steps)
    factor = data.get("rescale_factor")
    if factor is not None and not (is_number(factor) and abs(factor * 255 - 1) < _RESCALE_TOLERANCE):
        check_implemented(where, data, {"rescale_factor": (1 / 255,)})


def _channels(path: Path, data: Mapping[str, Any], key: str, default: Channels) -> Channels:
    stated = data.get(key)
    if stated is None:
        return default
    values = stated if isinstance(stated, list) else []
    if len(values) != 3 or not all(is_number(value) and abs(value) <= _LARGEST_CHANNEL for value in values):
        raise _malformed(path, f"{key}: three numbers of at most {_LARGEST_CHANNEL:g}", f"{stated!r:.200}")
    red, green, blue = map(float, values)
    return red, green, blue


def _malformed(path: Path, expected: str, got: str) -> InputError:
    return InputError("preprocessor_config.json is malformed", where=str(path), expected=expected, got=got)
