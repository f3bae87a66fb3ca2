"""Images and texts as callers hand them over: every kind, shared between threads, and refused by name."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export import Model, load
from vlm_export.errors import InputError
from vlm_export.runtime.inputs.images import ImageSource
from vlm_export.runtime.inputs.sources import decoder_threads, image_list, map_images, open_shared_image, text_list


@pytest.fixture(scope="module")
def pair(tiny_bundle: Path) -> Model:
    return load(tiny_bundle, threads=4)


@pytest.fixture(scope="module")
def path(data: Path) -> Path:
    return data / "runtime" / "images" / "large.png"


def watched(path: Path) -> tuple[Image.Image, Callable[[], int]]:
    """An image that Pillow has opened and not decoded, and a function that tells how many decoded it at once."""
    image, lock = Image.open(path), Lock()
    load_, inside, most = image.load, 0, 0

    def slow() -> Any:
        nonlocal inside, most
        if not image.tile:
            return load_()
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)
        try:
            return load_()
        finally:
            with lock:
                inside -= 1

    image.load = slow  # type: ignore[method-assign]
    return image, lambda: most


def test_an_image_is_decoded_by_one_thread(pair: Model, path: Path) -> None:
    image, most = watched(path)
    rows = pair.encode_image([image] * 8)
    assert most() == 1
    assert np.allclose(rows, pair.encode_image(path), atol=1e-5)


def test_every_kind_of_image(pair: Model, path: Path) -> None:
    content = path.read_bytes()
    with Image.open(path) as image, path.open("rb") as file:
        pixels = np.asarray(image.convert("RGB"))
        expected = pair.encode_image(image.convert("RGB"))
        stream = io.BytesIO(content)
        stream.seek(7)
        sources: list[ImageSource] = [path, str(path), content, bytearray(content), stream, file, image, pixels]
        for source in sources:
            assert np.allclose(pair.encode_image(source), expected, atol=1e-5), type(source)
        assert pair.encode_image([stream, stream, pixels]).shape == (3, 12)
        assert pair.encode_image(np.stack([pixels, pixels])).shape == (2, 12)
    assert pair.encode_image(np.array([str(path)])).shape == (1, 12)
    assert open_shared_image(np.zeros((4, 5), np.uint8), max_pixels=100, name="grey").size == (5, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "NoneType"),
        ([None], "image 0"),
        (5, "int"),
        (np.zeros((4, 4, 3), np.float32), "float32 (4, 4, 3)"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 (3, 4, 5)"),
        (np.zeros((0, 4, 3), np.uint8), "uint8 (0, 4, 3)"),
        (io.StringIO("text"), "stream of str"),
        ([b""], "image 0"),
        ("a\0b.png", "a\\x00b.png"),
        ("x" * 5000, "x" * 3000),
    ],
)
def test_what_is_no_image_is_refused(pair: Model, given: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        pair.encode_image(given)
    assert words in str(caught.value)


def test_a_given_image_that_cannot_be_decoded_is_named(pair: Model, path: Path) -> None:
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:60] + bytes([content[60] ^ 1]) + content[61:]):
        with pytest.raises(InputError, match="cannot be decoded") as caught:
            pair.encode_image([path, Image.open(io.BytesIO(broken))])
        assert caught.value.where == "image 1"
    with Image.open(path) as closed:
        pass
    with pytest.raises(InputError, match="cannot be decoded"):
        pair.encode_image(closed)


def test_images_keep_their_order_and_numbers() -> None:
    sources = [Image.new("L", (width, 1)) for width in range(1, 9)]
    with decoder_threads(3) as decoders:
        seen = map_images(lambda image, name: (image.width, name), sources, decoders, max_pixels=9, first=5)
    assert seen == [(width, f"image {width + 4}") for width in range(1, 9)]


def test_one_or_several() -> None:
    assert image_list("a.png") == ["a.png"]
    assert image_list(Path("a.png")) == [Path("a.png")]
    assert image_list(name for name in ("a", "b")) == ["a", "b"]  # type: ignore[arg-type]
    assert text_list("a b") == ["a b"]
    assert text_list(("a", "b")) == ["a", "b"]
    with pytest.raises(InputError, match="neither a string nor several"):
        text_list(None)  # type: ignore[arg-type]
