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
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from vlm_export.errors import EnvironmentFailure, InputError, VlmExportError
from vlm_export.specs import ImageSpec

FloatArray: TypeAlias = npt.NDArray[np.float32]
PictureSource: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | bytearray | BinaryIO | npt.NDArray[np.uint8]"
"""A Pillow picture, a path, the content of a file, an open file, or uint8 (H, W), (H, W, 3) or (H, W, 4)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's decoders that untrusted files may reach; JPEG includes the multi-picture files of phones."""

MAX_PIXELS = 128_000_000
"""Pictures above are refused before they are decoded; the largest cameras make 102 million pixels."""

MAX_RESIZED_PIXELS = 64_000_000
"""Bound while resizing. To the shorter edge, a 1x10000 picture would become 224x2240000. To a square, Pillow's first
pass would make 224x100000000 of 1x100000000, and weights for every pixel of its mirror image."""

MAX_STREAM_BYTES = 256 << 20
"""Read at most from what is no regular file, such as a pipe; the largest pictures within MAX_PIXELS are smaller."""

_OPENING = Lock()
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def open_image(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """Decode the first frame of a picture.

    Args:
        source: a path, also that of a pipe, or the bytes of a file.
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
    try:
        with path.open("rb") as stream:
            regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            return _decode(stream if regular else io.BytesIO(read_stream(stream, name)), max_pixels, name)
    except FileNotFoundError as error:
        raise _unreadable(name, "no such file") from error
    except IsADirectoryError as error:
        raise _unreadable(name, "a directory") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
        raise _unreadable(name, str(error)) from error


def read_stream(stream: BinaryIO, name: str) -> bytes:
    """A stream's content, from the start where it can go back; InputError above MAX_STREAM_BYTES, or when it fails."""
    try:
        if stream.seekable():
            stream.seek(0)
        content = stream.read(MAX_STREAM_BYTES + 1)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise _unreadable(name, str(error)) from error
    if not isinstance(content, bytes):
        raise _unreadable(name, f"a stream of {type(content).__name__}")
    if len(content) > MAX_STREAM_BYTES:
        raise _unreadable(name, f"a stream of more than {MAX_STREAM_BYTES:,} bytes")
    return content


@contextmanager
def named_decoding(name: str, expected: str, describe: Callable[[Exception], str]) -> Iterator[None]:
    """Around Pillow's decoders, which raise whatever they stumble on in untrusted bytes.

    Raises:
        InputError: any of it, with what `describe` makes of it.
        EnvironmentFailure: there is no memory to decode the picture.
    """
    try:
        yield
    except VlmExportError:
        raise
    except MemoryError as error:
        raise EnvironmentFailure("not enough memory to decode a picture", where=name) from error
    except Exception as error:
        raise InputError(
            "a picture cannot be decoded",
            where=name,
            expected=expected,
            got=describe(error),
            fix="open it in an image viewer and save it again, or leave it out",
        ) from error


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
    expected = f"a complete file: {', '.join(FORMATS)}"
    with named_decoding(name, expected, lambda error: _describe_failure(stream, error)):
        # `catch_warnings` is not thread-safe. Pillow warns above 89 million pixels; here `max_pixels` decides.
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
        _check_pixels(image.size, max_pixels, name)
        image.load()
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


def _unreadable(name: str, got: str) -> InputError:
    return InputError("a picture cannot be read", where=name, expected="a picture file", got=got)


def _describe_failure(stream: BinaryIO, error: Exception) -> str:
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"{size:,} bytes of another kind, starting with {stream.read(16)!r}"
    return f"{type(error).__name__}: {error}"
