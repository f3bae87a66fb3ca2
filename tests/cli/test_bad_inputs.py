"""Exit statuses and messages of the verbs that use bundles."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import load_tensor, numpy_helper
from PIL import Image

from vlm_export.exporting import pipeline

Cli = Callable[..., Any]
RefusedJson = Callable[..., dict[str, Any]]


def test_status_1_when_the_export_differs(
    cli: Cli,
    refused_json: RefusedJson,
    tmp_path: Path,
    checkpoint: Path,
    fast: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "write_graph", _write_another_graph)
    arguments = ("export", checkpoint, "-o", tmp_path / "bundle", "--quiet", "--no-simplify", *fast)
    cli(*arguments).refused(1, "vision", "expected: ", "got: ", "fix: ")
    assert refused_json(1, *arguments)["what"]
    assert not list(tmp_path.iterdir())


def _write_another_graph(model: Any, path: Path, threshold_bytes: int) -> list[Path]:
    """As write_graph, with one weight changed."""
    import onnx_ir as ir

    from vlm_export.exporting.finishing import write_graph

    value = model.graph.initializers["projection"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.5), name=value.name)
    return write_graph(model, path, threshold_bytes)


def test_status_1_when_the_golden_record_differs(
    cli: Cli, exported: Path, relist: Callable[[Path], None], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    name = "golden/text/test_data_set_0/output_0.pb"
    recorded = numpy_helper.to_array(load_tensor(bundle / name))
    changed = numpy_helper.from_array(recorded * np.float32(1.01), "text_embeds")
    (bundle / name).write_bytes(changed.SerializeToString())
    relist(bundle)
    result = cli("verify", bundle)
    result.refused(1, "text", "fix: ")
    assert "FAIL" in result.out
    data = cli("verify", bundle, "--json").refused(1, "text").data
    assert (data["passed"], data["error"], data["exit_status"]) == (False, "verification", 1)
    assert [report["passed"] for report in data["verification"]] == [True, False]


def test_verify_with_another_checkpoint(cli: Cli, exported: Path, checkpoint: Path) -> None:
    other = checkpoint.with_name("state_dict_fp32.pt")
    cli("verify", exported, "--source", other, "--quiet").refused(3, "not the checkpoint", "expected: ", "got: ")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["export", "clip-vit-b-23", "-o", "{out}", "--no-tokenizer"], ["clip-vit-b-", "fix: "]),
        (["export", "{checkpoint}", "-o", "{out}", "--opset", "24"], ["--opset", "expected: 11 to 23"]),
        (["export", "{checkpoint}", "-o", "{out}", "--opset", "17", "--exporter", "dynamo"], ["expected: 18 to 23"]),
        (["export", "{checkpoint}", "-o", "{out}", "--random-weights", "1"], ["known architecture"]),
        (["export", "{checkpoint}", "-o", "{out}", "--revision", "main"], ["hub ids"]),
        (["export", "{checkpoint}", "-o", "{out}", "--sha256", "zz"], ["64 hexadecimal digits", "'zz'"]),
        (["export", "{checkpoint}", "-o", "{out}", "--tokenizer", "{out}/none"], ["--tokenizer"]),
        (["export", "{checkpoint}", "-o", "{out}"], ["no tokenizer", "--no-tokenizer"]),
        (["export", "{checkpoint}", "-o", "{checkpoint}", "--no-tokenizer"], ["is a file"]),
        (["inspect", "nowhere/at/all"], ["no such file"]),
        (["embed", "{pair}", "{pair}/none.png", "-o", "{out}.npy"], ["no such file"]),
        (["embed", "{pair}", "{image}", "-o", "{out}.csv"], [".npy"]),
        (["classify", "{pair}", "{image}", "cat", "--template", "no place"], ["{{}}"]),
    ],
)
def test_status_2(
    cli: Cli, tmp_path: Path, pair: Path, checkpoint: Path, image_path: Path, arguments: list[str], texts: list[str]
) -> None:
    names = {"out": tmp_path / "out", "pair": pair, "checkpoint": checkpoint, "image": image_path}
    result = cli(*(argument.format(**names) for argument in arguments))
    result.refused(2, *(text.format(**names) for text in texts))
    assert result.out == ""
    assert not (tmp_path / "out").exists()


def test_errors_as_json(refused_json: RefusedJson, pair: Path, tmp_path: Path, image_path: Path) -> None:
    assert refused_json(2, "inspect", "nowhere at all")["where"] == "nowhere at all"
    error = refused_json(3, "classify", pair, pair / "tokenizer.json", "cat")
    assert error["where"].endswith("tokenizer.json")
    error = refused_json(4, "classify", pair, image_path, "cat", "--provider", "abacus")
    assert "CPUExecutionProvider" in error["expected"]


# Section B: what lies in a bundle is what was exported.
@pytest.mark.parametrize("name", ["onnx/vision_model.onnx", "onnx/text_model.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "link"])
def test_changed_bundle(cli: Cli, pair: Path, image_path: Path, name: str, damage: str) -> None:
    path = pair / name
    raw = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif damage == "truncated":
        path.write_bytes(raw[:-1])
    elif damage == "link":
        (pair / "elsewhere").write_bytes(raw)
        path.symlink_to(pair / "elsewhere")
    for verb in (("classify", pair, image_path, "cat", "--template", "{}"), ("verify", pair)):
        cli(*verb).refused(3, Path(name).name)


@pytest.mark.parametrize("kind", ["nothing", "empty directory", "graph", "checkpoint"])
def test_no_bundle(cli: Cli, tmp_path: Path, pair: Path, checkpoint: Path, image_path: Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    path = {
        "nothing": tmp_path / "none",
        "empty directory": tmp_path / "empty",
        "graph": pair / "onnx" / "vision_model.onnx",
        "checkpoint": checkpoint,
    }[kind]
    cli("classify", path, image_path, "cat").refused(3, str(path))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"schema_version": 99}', b"\xff"])
def test_broken_manifest(cli: Cli, pair: Path, raw: bytes, image_path: Path) -> None:
    (pair / "vlm_export.json").write_bytes(raw)
    for verb in (("inspect", pair), ("classify", pair, image_path, "cat"), ("verify", pair)):
        cli(*verb).refused(3, "vlm_export.json")


# Section D: images and texts.
def _png_of_zeros(width: int, height: int) -> bytes:
    """A grey image, compressed without ever being in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_too_many_pixels(cli: Cli, pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(_png_of_zeros(13_000, 13_000))
    assert path.stat().st_size < 200 << 10
    cli("classify", pair, path, "cat").refused(3, "too many pixels", "169,000,000", str(path))
    cli("embed", pair, path, "-o", tmp_path / "x.npy", "--quiet").refused(3, "too many pixels")
    assert not (tmp_path / "x.npy").exists()


def test_too_long_and_thin(cli: Cli, pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("L", (1, 200_000)).save(path)
    cli("classify", pair, path, "cat", "--template", "{}").refused(3, "too long and thin", str(path), "fix: ")


def test_unusual_images_have_an_embedding(cli: Cli, pair: Path, tmp_path: Path) -> None:
    ramp = np.arange(48 * 36, dtype=np.uint16).reshape(36, 48) * 37
    images = {
        "deep.png": Image.fromarray(ramp),
        "clear.png": Image.fromarray(np.dstack([ramp % 256] * 4).astype(np.uint8), "RGBA"),
        "ink.jpg": Image.fromarray(np.dstack([ramp % 256] * 4).astype(np.uint8), "CMYK"),
        "float.tiff": Image.fromarray(ramp.astype(np.float32)),
        "palette.gif": Image.effect_noise((48, 36), 90).convert("P"),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    paths = [tmp_path / name for name in images]
    assert cli("embed", pair, *paths, "-o", tmp_path / "x.npy", "--quiet").status == 0
    assert np.isfinite(np.load(tmp_path / "x.npy")).all()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "directory"])
def test_no_image(cli: Cli, pair: Path, tmp_path: Path, kind: str) -> None:
    path, buffer = tmp_path / "x.png", io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    if kind == "directory":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": buffer.getvalue()[:-2000]}[kind])
    cli("classify", pair, path, "cat", "--template", "{}").refused(3, str(path))


def test_endless_word(cli: Cli, pair: Path, tmp_path: Path, image_path: Path) -> None:
    path = tmp_path / "word.txt"
    path.write_text("a" * 64_000)
    cli("embed", pair, path, "-o", tmp_path / "x.npy", "--quiet").refused(3, "too many characters", "64,000")
    cli("classify", pair, image_path, "a" * 64_000).refused(3, "too many characters")
    assert not (tmp_path / "x.npy").exists()
    assert cli("embed", pair, path, "-o", tmp_path / "x.npy", "--quiet", "--truncate").status == 0


@pytest.mark.parametrize(
    ("raw", "text"), [(b"", "no lines"), (b"\n \n", "no lines"), (b"caf\xe9", "UTF-8"), (b"one two " * 30, "too long")]
)
def test_unusual_texts(cli: Cli, pair: Path, tmp_path: Path, raw: bytes, text: str) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(raw)
    cli("embed", pair, path, "-o", tmp_path / "x.npy", "--quiet").refused(3, text)
    assert not (tmp_path / "x.npy").exists()


def test_folder_without_images(cli: Cli, pair: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    cli("embed", pair, tmp_path / "none", "-o", tmp_path / "x.npy").refused(3, "no images", ".png")


def test_images_and_texts_do_not_mix(cli: Cli, pair: Path, tmp_path: Path, image_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    arguments = ("embed", pair, image_path, tmp_path / "a.txt", "-o", tmp_path / "x.npy")
    cli(*arguments).refused(2, "files of their own")


def test_bundle_without_a_tokenizer(cli: Cli, exported: Path, image_path: Path) -> None:
    cli("classify", exported, image_path, "cat").refused(3, "no tokenizer", "--tokenizer")


def test_embeddings_of_another_model(cli: Cli, pair: Path, exported: Path, image_path: Path, tmp_path: Path) -> None:
    assert cli("embed", exported, image_path, "-o", tmp_path / "x.npy", "--quiet").status == 0
    cli("search", pair, tmp_path / "x.npy", "cat").refused(3, "another model", "expected: ", "got: ")


@pytest.mark.parametrize("kind", ["missing", "no numbers", "without its notes", "a directory"])
def test_embeddings_that_are_none(cli: Cli, pair: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.npy"
    if kind == "no numbers":
        path.write_bytes(b"hello")
    elif kind == "without its notes":
        np.save(path, np.zeros((2, 16), np.float32))
    elif kind == "a directory":
        path.mkdir()
    result = cli("search", pair, path, "cat").refused(3, "x.npy")
    assert ("got: a directory" in result.err) == (kind == "a directory")


def test_disk_that_refuses_embeddings(
    cli: Cli, pair: Path, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cli("embed", pair, image_path, "-o", tmp_path / "x.npy", "--quiet").refused(4, "fix: ")
    assert not list(tmp_path.glob("*x.npy*"))


def test_embeddings_into_a_directory_that_is_not_there(cli: Cli, pair: Path, image_path: Path, tmp_path: Path) -> None:
    result = cli("embed", pair, image_path, "-o", tmp_path / "none" / "x.npy", "--quiet")
    assert result.status in (2, 4)
    result.refused(result.status, "none")
