"""Options of `export` that ask for what cannot be, or that used to be left without effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[1] / "data"
TILED = DATA / "nanovlm" / "split"
Cli = Callable[..., Any]


def test_an_image_that_is_cut_is_verified(cli: Cli, tmp_path: Path, image_path: Path, fast: tuple[str, ...]) -> None:
    """In pairs of tiles: four of each of the project's three, and all of the user's."""
    result = cli(
        "export", TILED, "-o", tmp_path / "b", "--part", "vision_encoder", "--json", *fast, "--image", image_path
    )
    assert result.status == 0, result.err
    (report,) = result.data["verification"]
    assert report["points"]["sample"] > 3 * 2


@pytest.mark.parametrize(
    ("arguments", "status", "texts"),
    [
        (["{clip}", "--part", "text", "--image", "{image}"], 2, ["takes an image", "got: text"]),
        (["{clip}", "--part", "text", "--image", "{out}/none.png"], 3, ["none.png", "no such file"]),
        (["{clip}", "--image", "{thin}"], 3, ["thin.png", "long and thin"]),
        (["{sliced}", "--part", "resampler", "--image", "{image}"], 2, ["takes an image"]),
        (["{clip}", "--part", "vision", "--with-preprocessing"], 2, ["vision_from_uint8", "--part"]),
        (["{tiled}", "--with-preprocessing"], 2, ["cut into slices or tiles"]),
        (["{clip}", "--opset", "24"], 2, ["no back end writes opset 24", "expected: 11 to 23"]),
        (["{clip}", "--external-data-threshold", "-1"], 2, ["-1 is below 0"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_exported(
    cli: Cli, tmp_path: Path, checkpoint: Path, image_path: Path, arguments: list[str], status: int, texts: list[str]
) -> None:
    from PIL import Image

    names = {"clip": checkpoint, "sliced": DATA / "minicpmv" / "v2_6", "tiled": TILED, "image": image_path}
    names |= {"out": tmp_path / "out", "thin": tmp_path / "thin.png"}
    Image.new("L", (1, 100_000)).save(names["thin"])
    result = cli("export", *(argument.format(**names) for argument in arguments), "--no-tokenizer", "-o", names["out"])
    assert result.status == status, result
    assert not any(text in result.err for text in ("Traceback", "export vision", "leave --exporter"))
    for text in texts:
        assert text in result.err
    assert not names["out"].exists()


def test_a_chat_model_asks_for_its_own_tokenizer(cli: Cli, tmp_path: Path) -> None:
    error = cli("export", DATA / "nanovlm" / "222m", "-o", tmp_path / "out", "--quiet").refused(2, "no tokenizer").err
    assert "tokenizer.json" in error
    assert "lm_tokenizer" in error
    for useless in ("merges", "vocab.txt", "open_clip_torch"):
        assert useless not in error


def test_preprocessing_stands_before_any_familys_images(cli: Cli, tmp_path: Path, fast: tuple[str, ...]) -> None:
    arguments = ("--with-preprocessing", "--part", "vision_from_uint8", "--quiet")
    result = cli("export", DATA / "nanovlm" / "222m", "-o", tmp_path / "bundle", *arguments, *fast)
    assert result.status == 0, result.err
    assert "vision_from_uint8" in result.out


def test_one_part_leaves_out_the_tasks_that_need_others(cli: Cli, fast: tuple[str, ...], tmp_path: Path) -> None:
    """Also where the tokenizer tells the tokens of a task."""
    result = cli("export", "blip-demo-caption", "-o", tmp_path / "b", "--part", "vision", "--quiet", *fast)
    assert result.status == 0
    manifest = json.loads((tmp_path / "b" / "vlm_export.json").read_text(encoding="utf-8"))
    assert (manifest["tasks"], [part["name"] for part in manifest["parts"]]) == ([], ["vision"])
