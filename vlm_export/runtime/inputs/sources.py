"""What callers hand over, one or several of it: texts, and images, which get names and are opened for threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs.images import ImageSource, named_decoding, open_image, read_stream

Images: TypeAlias = "ImageSource | Sequence[ImageSource]"
Unreadable: TypeAlias = Callable[[int, InputError], None]
"""Told the number of an image that cannot be read, and why: it raises the error, or the image is left out."""

Prepared = TypeVar("Prepared")

IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".ico",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""What files of images are named; their content decides what they are."""

_DECODER_THREADS = 4
# An image that Pillow opened decodes on first use, which two threads must not do at once: one lock for each of them,
# found by its id. Others that share the lock wait for no reason, but rarely.
_LOADING = tuple(Lock() for _ in range(61))


def is_image(value: object) -> bool:
    """Whether a value stands for one image, and is no sequence of images."""
    if isinstance(value, np.ndarray):
        return value.ndim in (2, 3)
    return isinstance(value, Image.Image | str | os.PathLike | bytes | bytearray) or hasattr(value, "read")


def image_list(images: Images) -> list[ImageSource]:
    """One or several images as a list; InputError when the value is neither."""
    # mypy cannot know that `is_image` decides.
    given: Any = images
    return [given] if is_image(given) else _listed(given, lambda: _no_image(given, "the images"))


def image_files(path: Path) -> list[Path]:
    """The images below a folder, in the order of their paths; of another path the path itself.

    Raises:
        UsageError: the folder holds none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file())
    if not found:
        raise UsageError("a folder holds no images", where=str(path), expected="files such as photo.jpg")
    return found


def text_list(texts: str | Sequence[str]) -> list[str]:
    """One or several texts as a list; InputError when the value is neither."""
    what = "texts are neither a string nor several"
    got = type(texts).__name__
    return [texts] if isinstance(texts, str) else _listed(texts, lambda: InputError(what, expected="a list", got=got))


def decoder_threads(threads: int | None) -> ThreadPoolExecutor:
    """Threads that `map_images` opens and prepares images in: so many, or 4."""
    return ThreadPoolExecutor(threads or _DECODER_THREADS)


def map_images(
    prepare: Callable[[Image.Image, str], Prepared],
    sources: Sequence[ImageSource],
    decoders: ThreadPoolExecutor,
    *,
    max_pixels: int,
    first: int = 0,
    unreadable: Unreadable | None = None,
) -> list[Prepared]:
    """What `prepare` makes of each image and its name, in threads.

    Args:
        max_pixels: of images that are decoded here.
        first: the number of the first source, in the names of images that have no path.
        unreadable: what is told of images that cannot be read, in their order; without it the first is an error.

    Raises:
        InputError: an image is unreadable or too large; the message names it.
    """

    def prepared(index: int, source: ImageSource) -> Prepared | InputError:
        name = image_name(source, index)
        try:
            return prepare(open_shared_image(source, max_pixels=max_pixels, name=name), name)
        except InputError as error:
            if unreadable is None:
                raise
            return error

    numbers = range(first, first + len(sources))
    found: list[Prepared] = []
    for index, result in zip(numbers, decoders.map(prepared, numbers, sources), strict=True):
        if not isinstance(result, InputError):
            found.append(result)
        elif unreadable is not None:
            unreadable(index, result)
    return found


def image_name(source: ImageSource, index: int) -> str:
    """What errors call an image: its path, or its number."""
    return str(source) if isinstance(source, str | os.PathLike) else f"image {index}"


def open_shared_image(source: ImageSource, *, max_pixels: int, name: str) -> Image.Image:
    """A decoded image that threads may share.

    Raises:
        InputError: no image, unreadable, or too large.
        EnvironmentFailure: there is no memory to decode it.
    """
    if isinstance(source, Image.Image):
        with (
            _lock_of(source),
            named_decoding(name, "an image that Pillow decodes", lambda error: f"{type(error).__name__}: {error}"),
        ):
            source.load()
        return source
    if isinstance(source, str | os.PathLike | bytes):
        return open_image(source, max_pixels=max_pixels, name=name)
    if isinstance(source, bytearray):
        return open_image(bytes(source), max_pixels=max_pixels, name=name)
    if isinstance(source, np.ndarray):
        return _image_from_array(source, name)
    if not hasattr(source, "read"):
        raise _no_image(source, name)
    with _lock_of(source):
        content = read_stream(source, name)
    return open_image(content, max_pixels=max_pixels, name=name)


def _image_from_array(pixels: Any, name: str) -> Image.Image:
    fits = pixels.dtype == np.uint8 and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
    if not fits or not pixels.size:
        raise InputError(
            "an array is no image",
            where=name,
            expected="uint8 (H, W, 3), (H, W, 4) or (H, W)",
            got=f"{pixels.dtype} {pixels.shape}",
            fix="order it as rows, columns, channels, from 0 to 255",
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _lock_of(source: object) -> Lock:
    return _LOADING[id(source) // 16 % len(_LOADING)]


def _listed(values: Any, refusal: Callable[[], InputError]) -> list[Any]:
    try:
        several = iter(values)
    except TypeError as error:
        raise refusal() from error
    return list(several)


def _no_image(value: object, name: str) -> InputError:
    return InputError(
        "an image is of another type",
        where=name,
        expected="a Pillow image, a path, the bytes of a file, an open file, or an array uint8 (H, W, 3)",
        got=type(value).__name__,
    )
