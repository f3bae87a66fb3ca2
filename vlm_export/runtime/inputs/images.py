"""Images to `pixel_values`, as the originals' own pipelines make them, with bounds on what a hostile file can cost.

An ImageSpec states what the original does, and each is reproduced to the last pixel. Of torchvision 0.29 on Pillow
images: Resize, CenterCrop, ToTensor, Normalize, as in `_transform` of openai/CLIP clip.py (d05afc4), open_clip 3.3.0
transform.py and salesforce/BLIP (056a169). Of transformers 5.23: `PilBackend` of image_processing_backends.py with
`convert_to_rgb`, `resize`, `center_crop`, `rescale` and `normalize` of image_transforms.py, equal as float32.
What follows from the originals is kept on purpose: EXIF rotation is ignored; the hidden colour of transparent pixels
shows, but for transformers 5, which puts them on white; integer and float images clip at 255; palettes and bitmaps are
resized by nearest neighbour when RGB comes after the crop; of an animation the first frame counts.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_export.errors import EnvironmentFailure, InputError, VlmExportError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.patches import patch_shape
from vlm_export.specs import Crop, ImageSpec, PatchSpec

FloatArray: TypeAlias = npt.NDArray[np.float32]
ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | bytearray | BinaryIO | npt.NDArray[np.uint8]"
"""A Pillow image, a path, the content of a file, an open file, or uint8 (H, W), (H, W, 3) or (H, W, 4)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
"""Pillow's decoders that untrusted files may reach: what cameras, browsers and drawing programs write.

JPEG includes the multi-image files of phones. AVIF (libavif; in Pillow's wheels from 11.3) and JPEG 2000 (OpenJPEG)
are fuzzed libraries, as those of WEBP and TIFF. ICO holds PNG and BMP; TGA is decoded by Pillow itself, and comes last,
since it has no signature. Formats that run other programs (EPS), draw (WMF) or that hardly anyone has stay outside.
"""

_ICON_SIGNATURE, _PNG = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"
# Where a file's signature stands, the signature, and what people call such files.
_SIGNATURES = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
)

MAX_PIXELS = 128_000_000
"""Images above are refused before they are decoded; the largest cameras make 102 million pixels."""

MAX_RESIZED_PIXELS = 64_000_000
"""Bound while resizing. To the shorter edge, a 1x10000 image would become 224x2240000. To a square, Pillow's first
pass would make 224x100000000 of 1x100000000, and weights for every pixel of its mirror image."""

MAX_STREAM_BYTES = 256 << 20
"""Read at most from what is no regular file, such as a pipe; the largest images within MAX_PIXELS are smaller."""

_OPENING = Lock()


def open_image(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """Decode the first frame of an image.

    Args:
        source: a path, also that of a pipe, or the bytes of a file.
        max_pixels: checked against the header, before memory for pixels is taken. Pillow itself refuses more than
            about 179 million.
        name: what errors call the image; the path by default.

    Raises:
        InputError: missing, not an image of FORMATS, truncated or too large.
        EnvironmentFailure: there is no memory to decode it, or the machine stands in the way otherwise.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), max_pixels, name or "image from memory")
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
        raise machine_fault(error, name) or _unreadable(name, str(error)) from error


def read_stream(stream: BinaryIO, name: str) -> bytes:
    """A stream's content, from the start where it can go back; InputError above MAX_STREAM_BYTES, or when it fails."""
    try:
        if stream.seekable():
            stream.seek(0)
        content = stream.read(MAX_STREAM_BYTES + 1)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise machine_fault(error, name) or _unreadable(name, str(error)) from error
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
        EnvironmentFailure: there is no memory to decode the image.
    """
    try:
        yield
    except VlmExportError:
        raise
    except MemoryError as error:
        raise EnvironmentFailure("not enough memory to decode an image", where=name) from error
    except Exception as error:
        raise machine_fault(error, name) or InputError(
            "an image cannot be decoded",
            where=name,
            expected=expected,
            got=describe(error),
            fix="open it in an image viewer and save it again, or leave it out",
        ) from error


def preprocess_image(
    image: Image.Image,
    spec: ImageSpec | PatchSpec,
    *,
    max_resized_pixels: int = MAX_RESIZED_PIXELS,
    name: str = "image",
) -> FloatArray:
    """Resize, crop, convert, rescale and normalise one image, as its spec says.

    Returns:
        float32 (3, S, S), S = `spec.size_pixels`; for patches (3, H, W), whole numbers of them.

    Raises:
        InputError: the image has no pixels, is so long and thin that resizing it exceeds the bound, is not in RGB where
            the original converts nothing, or comes out in another size where the original crops nothing.
    """
    _check_resized(image.size, spec, max_resized_pixels, name)
    if spec.rgb_stage == "never" and image.mode != "RGB":
        raise InputError(
            "the original takes images in RGB alone: its processor converts none (do_convert_rgb)",
            where=name,
            expected="mode RGB",
            got=f"mode {image.mode}",
            fix="convert the image to RGB first",
        )
    try:
        if spec.rgb_stage == "before_resize":
            image = _converted(image, spec)
        square = _resized(image, spec)
        if isinstance(spec, ImageSpec):
            square = _cropped(square, spec, name)
        if spec.rgb_stage == "after_crop":
            square = _converted(square, spec)
    except (OSError, ValueError) as error:
        raise machine_fault(error, name) or InputError(
            "an image cannot be converted to RGB",
            where=name,
            expected="an image that Pillow resizes and converts",
            got=f"mode {image.mode}: {error}",
        ) from error
    return _normalised(square, spec)


def _normalised(image: Image.Image, spec: ImageSpec | PatchSpec) -> FloatArray:
    """An image in RGB rescaled and normalised, float32 (3, H, W); computed once for each level of a pixel."""
    # As transformers rescales; for 1/255 the same float32 values as a division by 255, which torchvision does.
    levels = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = (np.asarray(values, dtype=np.float32)[:, None] for values in (spec.mean, spec.std))
    tables = (levels - mean) / std
    pixels = np.asarray(image, dtype=np.uint8)
    normalised = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        # No level lies outside a table; "wrap" writes to `out` without a copy.
        np.take(tables[channel], pixels[:, :, channel], out=normalised[channel], mode="wrap")
    return normalised


def resized_size(size: tuple[int, int], shorter_edge: int) -> tuple[int, int]:
    """(width, height) after the shorter edge becomes `shorter_edge`; the longer one is rounded down."""
    width, height = size
    longer = int(shorter_edge * max(size) / min(size))
    return (shorter_edge, longer) if width <= height else (longer, shorter_edge)


def _decode(stream: BinaryIO, max_pixels: int, name: str) -> Image.Image:
    with _OPENING:
        formats = readable_formats()
    expected = f"a complete file: {', '.join(formats)}"
    with named_decoding(name, expected, lambda error: _describe_failure(stream, error)):
        _check_icons(stream, max_pixels, name)
        # `catch_warnings` is not thread-safe. Pillow warns above 89 million pixels; here `max_pixels` decides.
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(stream, formats=formats)
        _check_pixels(image.size, max_pixels, name)
        image.load()
    return image


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow reads: AVIF may be missing."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_icons(stream: BinaryIO, max_pixels: int, name: str) -> None:
    """The PNG or BMP headers of an icon's images: its directory may say less, and Pillow decodes while it opens."""
    start = stream.read(6)
    if start.startswith(_ICON_SIGNATURE) and len(start) == 6:
        directory = stream.read(16 * int.from_bytes(start[4:], "little"))
        for entry in range(len(directory) // 16):
            stream.seek(int.from_bytes(directory[16 * entry + 12 : 16 * entry + 16], "little"))
            header = stream.read(24)
            if len(header) < 24:
                continue
            width, height = struct.unpack("<2i", header[4:12])
            # A BMP in an icon has its mask below its colours.
            size = abs(width), abs(height) // 2
            _check_pixels(struct.unpack(">2I", header[16:]) if header.startswith(_PNG) else size, max_pixels, name)
    stream.seek(0)


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InputError(
            "an image has too many pixels",
            where=name,
            expected=f"at most {max_pixels:,} pixels",
            got=f"{width} x {height} = {width * height:,}",
            fix="scale it down first, or raise max_pixels",
        )


def _check_resized(size: tuple[int, int], spec: ImageSpec | PatchSpec, max_pixels: int, name: str) -> None:
    if min(size) < 1:
        raise InputError("an image has no pixels", where=name, got=f"{size[0]} x {size[1]}")
    width, height = target = _target_size(size, spec)
    if isinstance(spec, PatchSpec) or spec.resize == "stretch":
        # Between Pillow's two passes, either edge may still have its own length.
        width, height = (max(size[0], width), height) if size[0] > size[1] else (width, max(size[1], height))
    if target == size:
        return
    if width * height > max_pixels:
        raise InputError(
            "an image is too long and thin to resize",
            where=name,
            expected=f"at most {max_pixels:,} pixels while and after resizing",
            got=f"{size[0]} x {size[1]} would take {width} x {height}",
            fix="crop it nearer to a square",
        )


def _converted(image: Image.Image, spec: ImageSpec | PatchSpec) -> Image.Image:
    """In RGB. Bands and `info` tell of transparency, as `convert_to_rgb` of transformers 5.23 looks at them."""
    on_white = isinstance(spec, PatchSpec) or spec.transparency == "white"
    if on_white and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _target_size(size: tuple[int, int], spec: ImageSpec | PatchSpec) -> tuple[int, int]:
    """(width, height) after the resize."""
    if isinstance(spec, PatchSpec):
        rows, columns = patch_shape(size, spec)
        return columns * spec.patch_size, rows * spec.patch_size
    if spec.resize == "shortest_edge":
        return resized_size(size, spec.resize_pixels[0])
    if spec.resize == "longest_edge":
        # As `ResizeKeepRatio` of open_clip and timm: a ratio first, then rounded to even.
        ratio = max(edge / spec.resize_pixels[0] for edge in size)
        return max(round(size[0] / ratio), 1), max(round(size[1] / ratio), 1)
    return (spec.resize_pixels[1], spec.resize_pixels[0]) if spec.resize == "stretch" else size


def _resized(image: Image.Image, spec: ImageSpec | PatchSpec) -> Image.Image:
    # On the image's own mode: Pillow premultiplies alpha and treats palettes by nearest neighbour.
    size = _target_size(image.size, spec)
    return image if image.size == size else image.resize(size, Image.Resampling[spec.resample.upper()])


def _cropped(image: Image.Image, spec: ImageSpec, name: str) -> Image.Image:
    edge = spec.size_pixels
    if spec.crop != "none":
        if spec.fill and min(image.size) < edge:
            image = _padded(image, edge, spec.fill)
        left, top = (crop_offset(extent - edge, spec.crop) for extent in image.size)
        return image.crop((left, top, left + edge, top + edge))
    if image.size != (edge, edge):
        raise InputError(
            "the original crops nothing, and this image does not come out as a square of the model's size",
            where=name,
            expected=f"{edge} x {edge} after the resize ({spec.resize})",
            got=f"{image.width} x {image.height}",
            fix=f"crop it first to {'a square' if spec.resize == 'shortest_edge' else f'{edge} x {edge} pixels'}",
        )
    return image


def _padded(image: Image.Image, edge: int, fill: int) -> Image.Image:
    """At least a square of `edge`, every band at `fill` around the image, as torchvision's `pad` has it."""
    missing = [max(edge - extent, 0) for extent in image.size]
    border = (*(m // 2 for m in missing), *((m + 1) // 2 for m in missing))
    level = fill if len(image.getbands()) == 1 else (fill,) * len(image.getbands())
    padded = ImageOps.expand(image, border=border, fill=level)
    if image.mode == "P":
        padded.putpalette(image.getpalette() or [])
    return padded


def crop_offset(margin: int, crop: Crop) -> int:
    """Where a centre crop starts that leaves `margin` pixels out; negative where pixels are missing and Pillow pads.

    torchvision rounds half of an odd margin to the even side, and puts the odd pixel of padding at the end;
    transformers rounds down, which puts it at the start.
    """
    if crop == "down":
        return margin // 2
    return round(margin / 2) if margin >= 0 else -(-margin // 2)


def _unreadable(name: str, got: str) -> InputError:
    return InputError("an image cannot be read", where=name, expected="an image file", got=got)


def _describe_failure(stream: BinaryIO, error: Exception) -> str:
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size == 0:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        start = stream.read(16)
        stream.seek(0)
        for offset, signature, kind in _SIGNATURES:
            if start[offset:].startswith(signature):
                return f"{size:,} bytes of {kind}, which is not among the formats"
        return f"{size:,} bytes of another kind, starting with {stream.read(16)!r}"
    return f"{type(error).__name__}: {error}"
