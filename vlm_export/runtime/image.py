"""Pictures to `pixel_values`, as the originals' own pipelines make them, with bounds on what a hostile file can cost.

Order and rounding are those of `_transform` in openai/CLIP clip.py (d05afc4), which runs torchvision's Resize,
CenterCrop, ToTensor and Normalize on the PIL picture. `ImageSpec.fit` "squash" is salesforce/BLIP's (056a169):
convert to RGB, then Resize to both edges, and no crop. What follows from it is kept on purpose: EXIF rotation is
ignored; the hidden colour of transparent pixels shows (transformers 5 blends them with white); integer and float
pictures clip at 255; palettes and bitmaps are resized by nearest neighbour when RGB comes after the crop; of an
animation the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from threading import Lock
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from vlm_export.errors import EnvironmentFailure, InputError
from vlm_export.specs import ImageSpec

FloatArray: TypeAlias = npt.NDArray[np.float32]
PictureSource: TypeAlias = "Image.Image | str | Path | bytes"

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's decoders that untrusted files may reach; JPEG includes the multi-picture files of phones."""

MAX_PIXELS = 128_000_000
"""Pictures above are refused before they are decoded; the largest cameras make 102 million pixels."""

MAX_RESIZED_PIXELS = 64_000_000
"""Bound while resizing. To the shorter edge, a 1x10000 picture would become 224x2240000. To a square, Pillow's first
pass would make 224x100000000 of 1x100000000, and weights for every pixel of its mirror image."""

_OPENING = Lock()
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def open_image(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """Decode the first frame of a picture.

    Args:
        source: a path, or the bytes of a file.
        max_pixels: checked against the header, before memory for pixels is taken. Pillow itself refuses more than
            about 179 million.
        name: what errors call the picture; the path by default.

    Raises:
        InputError: missing, not a picture of FORMATS, truncated or too large.
        EnvironmentFailure: there is no memory to decode it.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), max_pixels, name or "picture from memory")
    path, name = Path(source), name or str(source)
    if not path.is_file():
        got = "a directory" if path.is_dir() else "no such file"
        raise InputError("a picture cannot be read", where=name, expected="a picture file", got=got)
    try:
        with path.open("rb") as stream:
            return _decode(stream, max_pixels, name)
    except OSError as error:
        raise InputError("a picture cannot be read", where=name, got=str(error)) from error


def preprocess_image(
    image: Image.Image,
    spec: ImageSpec,
    *,
    max_resized_pixels: int = MAX_RESIZED_PIXELS,
    name: str = "picture",
) -> FloatArray:
    """Resize, crop (unless it is squashed), convert and normalise one picture.

    Returns:
        float32 (3, S, S), S = `spec.size_pixels`.

    Raises:
        InputError: the picture has no pixels, or is so long and thin that resizing it exceeds the bound.
    """
    _check_resized(image.size, spec, max_resized_pixels, name)
    try:
        if spec.rgb_stage == "before_resize":
            image = image.convert("RGB")
        square = _fit_square(image, spec).convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(
            "a picture cannot be converted to RGB",
            where=name,
            expected="a picture that Pillow resizes and converts",
            got=f"mode {image.mode}: {error}",
        ) from error
    pixels = np.asarray(square, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean = np.asarray(spec.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(spec.std, dtype=np.float32)[:, None, None]
    normalised: FloatArray = np.ascontiguousarray((pixels - mean) / std)
    return normalised


def resized_size(size: tuple[int, int], shorter_edge: int) -> tuple[int, int]:
    """(width, height) after the shorter edge becomes `shorter_edge`; the longer one is rounded down."""
    width, height = size
    longer = int(shorter_edge * max(size) / min(size))
    return (shorter_edge, longer) if width <= height else (longer, shorter_edge)


def _decode(stream: BinaryIO, max_pixels: int, name: str) -> Image.Image:
    try:
        # `catch_warnings` is not thread-safe. Pillow warns above 89 million pixels; here `max_pixels` decides.
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
        _check_pixels(image.size, max_pixels, name)
        image.load()
    except InputError:
        raise
    except MemoryError as error:
        raise EnvironmentFailure("not enough memory to decode a picture", where=name) from error
    except Exception as error:  # Decoders of untrusted bytes raise whatever they stumble on.
        raise InputError(
            "a picture cannot be decoded",
            where=name,
            expected=f"a complete file: {', '.join(FORMATS)}",
            got=_describe_failure(stream, error),
            fix="open it in an image viewer and save it again, or leave it out",
        ) from error
    return image


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InputError(
            "a picture has too many pixels",
            where=name,
            expected=f"at most {max_pixels:,} pixels",
            got=f"{width} x {height} = {width * height:,}",
            fix="scale it down first, or raise max_pixels",
        )


def _check_resized(size: tuple[int, int], spec: ImageSpec, max_pixels: int, name: str) -> None:
    if min(size) < 1:
        raise InputError("a picture has no pixels", where=name, got=f"{size[0]} x {size[1]}")
    if spec.fit == "squash":
        # Between Pillow's two passes, either edge may still have its own length.
        longer = max(*size, spec.size_pixels)
        width, height = (longer, spec.size_pixels) if size[0] > size[1] else (spec.size_pixels, longer)
    else:
        width, height = resized_size(size, spec.size_pixels)
    if width * height > max_pixels:
        raise InputError(
            "a picture is too long and thin to resize",
            where=name,
            expected=f"at most {max_pixels:,} pixels while and after resizing",
            got=f"{size[0]} x {size[1]} would take {width} x {height}",
            fix="crop it nearer to a square",
        )


def _fit_square(image: Image.Image, spec: ImageSpec) -> Image.Image:
    edge = spec.size_pixels
    if spec.fit == "squash":
        return _resize(image, (edge, edge), spec)
    return _crop_centre(_resize(image, resized_size(image.size, edge), spec), edge)


def _resize(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> Image.Image:
    # On the picture's own mode: Pillow premultiplies alpha and treats palettes by nearest neighbour.
    return image if image.size == size else image.resize(size, _FILTERS[spec.resample])


def _crop_centre(image: Image.Image, edge: int) -> Image.Image:
    # Half a pixel goes to the even side: Python's round, as torchvision has it.
    left, top = (round((extent - edge) / 2.0) for extent in image.size)
    return image.crop((left, top, left + edge, top + edge))


def _describe_failure(stream: BinaryIO, error: Exception) -> str:
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"{size:,} bytes of another kind, starting with {stream.read(16)!r}"
    return f"{type(error).__name__}: {error}"
