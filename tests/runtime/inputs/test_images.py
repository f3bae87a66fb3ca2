"""Preprocessing equals the original's pixels, and hostile images end in a clear error."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vlm_export.errors import InputError
from vlm_export.runtime.inputs import images as image_module
from vlm_export.runtime.inputs.images import open_image, preprocess_image, resized_size
from vlm_export.specs import ImageSpec, RgbStage, torchvision_image_spec

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IMAGES = sorted(path.name for path in (Path(__file__).parents[2] / "data" / "runtime" / "images").iterdir())
VARIANTS = ("rn_tiny", "vit_p14", "vit_w128")


BLIP_VARIANTS = ("caption", "feature_extractor", "retrieval", "vqa")


def image_spec(
    size_pixels: int = 24,
    rgb_stage: RgbStage = "after_crop",
    resize: Literal["shortest_edge", "stretch"] = "shortest_edge",
) -> ImageSpec:
    return torchvision_image_spec(size_pixels, "bicubic", rgb_stage, MEAN, STD, resize)


def tensor_from_safetensors(path: Path, name: str) -> npt.NDArray[Any]:
    """A float32 or uint8 tensor, read by the format's own rules: a length, a JSON header, raw bytes."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + header_bytes])[name]
    start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
    flat: npt.NDArray[Any] = np.frombuffer(raw[start:end], {"F32": "<f4", "U8": "u1"}[entry["dtype"]])
    tensor: npt.NDArray[Any] = flat.reshape(entry["shape"])
    return tensor


def assert_close(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-6


@pytest.mark.parametrize("stage", ["after_crop", "before_resize"])
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_torchvision(data: Path, name: str, stage: RgbStage) -> None:
    image = open_image(data / "runtime" / "images" / name)
    expected = np.load(data / "runtime" / "images.npz")[f"{stage}/{name}"]
    assert_close(preprocess_image(image, image_spec(rgb_stage=stage)), expected)


def test_recorded_images_tell_the_two_stages_apart(data: Path) -> None:
    expected = np.load(data / "runtime" / "images.npz")
    differing = {n for n in IMAGES if np.abs(expected[f"after_crop/{n}"] - expected[f"before_resize/{n}"]).max() > 0.1}
    assert {"palette.png", "transparent.png", "bitmap.png"} <= differing
    assert "portrait.png" not in differing


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_equal_the_original_record(data: Path, variant: str) -> None:
    folder = data / "clip" / variant
    expected = tensor_from_safetensors(folder / "golden.safetensors", "preprocess.image_png")
    edge = int(expected.shape[-1])
    image = open_image(folder / "image.png")
    assert_close(preprocess_image(image, image_spec(edge)), expected.reshape(3, edge, edge))


@pytest.mark.parametrize("variant", BLIP_VARIANTS)
def test_stretched_pixels_equal_the_original_record(data: Path, variant: str) -> None:
    folder = data / "blip" / variant
    expected = tensor_from_safetensors(folder / "golden.safetensors", "preprocess.image_png")
    edge = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["config"]["image_size"]
    image = open_image(folder / "image.png")
    assert image.width != image.height
    assert_close(preprocess_image(image, image_spec(edge, "before_resize", "stretch")), expected)
    cropped = preprocess_image(image, image_spec(edge, "before_resize"))
    assert np.abs(cropped - expected).max() > 0.1


def test_one_pixel_stretches_to_one_colour() -> None:
    (red, green, blue) = preprocess_image(Image.new("RGB", (1, 1), (255, 128, 0)), image_spec(resize="stretch"))
    for channel, value, mean, std in zip((red, green, blue), (255, 128, 0), MEAN, STD, strict=True):
        assert_close(channel, np.full((24, 24), (value / 255 - mean) / std))


def test_bytes_and_path_give_the_same_image(data: Path) -> None:
    path = data / "runtime" / "images" / "large.png"
    assert open_image(path).tobytes() == open_image(path.read_bytes()).tobytes()


def test_animations_give_their_first_frame_and_close_the_file(data: Path) -> None:
    path = data / "runtime" / "images" / "animated.gif"
    with Image.open(path) as first:
        expected = first.convert("RGB").tobytes()
    image = open_image(path)
    assert image.convert("RGB").tobytes() == expected


def test_rotation_in_exif_is_ignored_as_in_the_original(data: Path) -> None:
    image = open_image(data / "runtime" / "images" / "rotated.png")
    assert image.getexif()[0x0112] == 6
    assert image.size == (53, 37)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (48, 24)), ((50, 100), (24, 48)), ((7, 5), (33, 24)), ((3, 3), (24, 24))]
)
def test_longer_edge_is_rounded_down(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 24) == expected


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and stores one grey row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    row = zlib.compress(bytes(width + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(13000, 13000), (20000, 20000), (1, 200_000_001)])
def test_too_many_pixels_are_refused_by_the_header(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(InputError, match=r"bomb\.png") as caught:
        open_image(path)
    assert caught.value.exit_status == 3
    assert "pixels" in str(caught.value)


def test_own_bound_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("L", (10, 10)).save(path)
    assert open_image(path, max_pixels=100).size == (10, 10)
    with pytest.raises(InputError, match="too many pixels"):
        open_image(path, max_pixels=99)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_long_thin_image_is_refused_before_resizing(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="too long and thin") as caught:
        preprocess_image(Image.new("RGB", size), image_spec(224), name="ribbon.png")
    assert "ribbon.png" in str(caught.value)
    assert "2240000" in str(caught.value)


@pytest.mark.parametrize("size", [(1, 500_000), (500_000, 1), (300, 400_000)])
def test_long_thin_image_is_refused_before_stretching(size: tuple[int, int]) -> None:
    """Pillow's first pass would make 224 x 500,000 pixels of the first."""
    with pytest.raises(InputError, match="too long and thin") as caught:
        preprocess_image(Image.new("L", size), image_spec(224, resize="stretch"), name="ribbon.png")
    assert "ribbon.png" in str(caught.value)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_what_a_crop_refuses_may_be_stretched(size: tuple[int, int]) -> None:
    assert preprocess_image(Image.new("L", size), image_spec(224, resize="stretch")).shape == (3, 224, 224)


def damaged(kind: str, data: Path) -> bytes:
    png = (data / "runtime" / "images" / "large.png").read_bytes()
    return {
        "empty": b"",
        "text": b"this is no image, but a sentence",
        "html": b"<!doctype html><html></html>",
        "truncated": png[: len(png) // 2],
        "header only": png[:20],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "bad checksum": png[:60] + bytes([png[60] ^ 1]) + png[61:],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "text", "html", "truncated", "header only", "svg", "postscript", "bad checksum"]
)
@pytest.mark.parametrize("from_path", [True, False])
def test_damaged_files_are_named(kind: str, from_path: bool, data: Path, tmp_path: Path) -> None:
    content = damaged(kind, data)
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        open_image(path) if from_path else open_image(content, name="broken.png")
    assert caught.value.exit_status == 3
    assert "broken.png" in str(caught.value)
    if kind == "empty":
        assert caught.value.got == "an empty file"


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(InputError, match="a directory"):
        open_image(tmp_path)


def test_a_pipe_is_read_to_its_end(data: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "pipe.png", (data / "runtime" / "images" / "large.png").read_bytes()
    os.mkfifo(path)
    for sent in (content, content[:100], b""):
        writer = Thread(target=path.write_bytes, args=(sent,))
        writer.start()
        try:
            if sent == content:
                assert open_image(path).tobytes() == open_image(content).tobytes()
            else:
                with pytest.raises(InputError, match="cannot be decoded"):
                    open_image(path)
        finally:
            writer.join()


def test_a_pipe_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_STREAM_BYTES", 1 << 16)
    with pytest.raises(InputError, match="cannot be read") as caught:
        open_image("/dev/zero")
    assert "more than 65,536 bytes" in caught.value.got


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000, "x" * 300])
def test_names_that_no_system_takes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path / name)


def test_image_without_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="no pixels"):
        preprocess_image(Image.new("RGB", (0, 5)), image_spec())


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("avif", "RGB"), ("avif", "RGBA"), ("jp2", "RGB"), ("jp2", "LA"), ("tga", "RGBA"), ("ico", "RGBA")],
)
def test_formats_that_the_originals_read_too(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.effect_noise((64, 48), 90).convert(mode).save(path)
    with Image.open(path) as theirs:
        image = open_image(path)
        assert image.mode == theirs.mode
        assert np.array_equal(np.asarray(image), np.asarray(theirs))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_other_formats_are_called_by_their_names(content: bytes, kind: str) -> None:
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        open_image(content + bytes(64))
    assert f"{kind}, which is not among the formats" in caught.value.got
    assert "AVIF" in caught.value.expected


@pytest.mark.parametrize("bmp", [False, True])
def test_an_icon_whose_image_is_larger_than_its_directory_says(bmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory's byte for 32 pixels stands before an image of thousands; Pillow would decode it while it opens."""
    monkeypatch.setattr(Image, "open", None)
    large = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(large, "BMP" if bmp else "PNG")
    content = large.getvalue()[14:] if bmp else large.getvalue()
    entry = struct.pack("<4B2H2I", 32, 32, 0, 0, 1, 24, len(content), 22)
    with pytest.raises(InputError, match="too many pixels") as caught:
        open_image(struct.pack("<3H", 0, 1, 1) + entry + content, max_pixels=5_000_000)
    assert "4000" in caught.value.got
