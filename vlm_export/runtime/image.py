"""Pictures to `pixel_values`, as CLIP's own pipeline makes them, with bounds on what a hostile file can cost.

Order and rounding are those of `_transform` in openai/CLIP clip.py (d05afc4), which runs torchvision's Resize,
CenterCrop, ToTensor and Normalize on the PIL picture. What follows from it, kept on purpose: EXIF rotation is ignored;
the hidden colour of transparent pixels shows; integer and float pictures clip at 255; palettes and bitmaps are resized
by nearest neighbour when RGB comes after the crop; of an animation the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TypeAlias

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
"""Bound after resizing the shorter edge: a 1x10000 picture would become 224x2240000."""

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
    name = name or ("picture from memory" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes) and not Path(source).is_file():
        got = "a directory" if Path(source).is_dir() else "no such file"
        raise InputError("a picture cannot be read", where=name, expected="a picture file", got=got)
    try:
        image = _open_header(source)
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
            got=_describe_failure(source, error),
            fix="open it in an image viewer and save it again, or leave it out",
        ) from error
    return image


def preprocess_image(
    image: Image.Image,
    spec: ImageSpec,
    *,
    max_resized_pixels: int = MAX_RESIZED_PIXELS,
    name: str = "picture",
) -> FloatArray:
    """Resize, crop, convert and normalise one picture.

    Returns:
        float32 (3, S, S), S = `spec.size_pixels`.

    Raises:
        InputError: the picture has no pixels, or is so long and thin that its resized form exceeds the bound.
    """
    _check_resized(image.size, spec.size_pixels, max_resized_pixels, name)
    try:
        if spec.rgb_stage == "before_resize":
            image = image.convert("RGB")
        square = _crop_centre(_resize_shorter_edge(image, spec), spec.size_pixels).convert("RGB")
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


def _open_header(source: str | Path | bytes) -> Image.Image:
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Pillow warns above 89 million pixels and raises above twice that; `max_pixels` decides below.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(stream, formats=FORMATS)


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


def _check_resized(size: tuple[int, int], shorter_edge: int, max_pixels: int, name: str) -> None:
    if min(size) < 1:
        raise InputError("a picture has no pixels", where=name, got=f"{size[0]} x {size[1]}")
    width, height = resized_size(size, shorter_edge)
    if width * height > max_pixels:
        raise InputError(
            "a picture is too long and thin to resize its shorter edge",
            where=name,
            expected=f"at most {max_pixels:,} pixels after resizing",
            got=f"{size[0]} x {size[1]} would become {width} x {height}",
            fix="crop it nearer to a square",
        )


def _resize_shorter_edge(image: Image.Image, spec: ImageSpec) -> Image.Image:
    size = resized_size(image.size, spec.size_pixels)
    # On the picture's own mode: Pillow premultiplies alpha and treats palettes by nearest neighbour.
    return image if image.size == size else image.resize(size, _FILTERS[spec.resample])


def _crop_centre(image: Image.Image, edge: int) -> Image.Image:
    # Half a pixel goes to the even side: Python's round, as torchvision has it.
    left, top = (round((extent - edge) / 2.0) for extent in image.size)
    return image.crop((left, top, left + edge, top + edge))


def _describe_failure(source: str | Path | bytes, error: Exception) -> str:
    if isinstance(source, bytes):
        head, size = source[:16], len(source)
    else:
        path = Path(source)
        try:
            with path.open("rb") as file:
                head = file.read(16)
            size = path.stat().st_size
        except OSError as failure:
            return str(failure)
    if size == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"{size:,} bytes of another kind, starting with {head!r}"
    return f"{type(error).__name__}: {error}"
