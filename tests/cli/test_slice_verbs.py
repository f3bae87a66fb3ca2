"""The verbs of bundles that cut images into slices: what they print, write and draw, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export import load
from vlm_export.runtime.search.store import npy_metadata

pytestmark = pytest.mark.needs_torch

Cli = Callable[..., Any]
Bundle = Callable[[str], Path]
FOLDER = Path(__file__).parents[1] / "data" / "minicpmv" / "preprocess"
WIDE, SMALL = FOLDER / "wide.png", FOLDER / "small.png"
ONE = ("--threads", "1")
NO_TORCH = "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors', 'yaml'): sys.modules[name] = None"


def test_embed_npy(cli: Cli, slice_bundle: Bundle, tmp_path: Path) -> None:
    bundle, output = slice_bundle("v2_6"), tmp_path / "f.npy"
    result = cli("embed", bundle, FOLDER, "-o", output, *ONE)
    assert result.status == 0
    assert result.out.startswith(f"2 images, 4 slices of 5 x 256 numbers in {output}")
    assert "image" in result.err
    # In the folder's order.
    expected = load(bundle, threads=1).features([SMALL, WIDE])
    assert np.array_equal(np.load(output), np.concatenate([entry.image_features for entry in expected]))
    rows = npy_metadata(tmp_path / "f.npy")["rows"]
    assert [row["item"] for row in rows] == [str(SMALL), *[str(WIDE)] * 3]
    data = cli("embed", bundle, SMALL, "-o", output, "--overwrite", "--quiet", "--json", *ONE, "--batch-size", "1").data
    assert data.pop("seconds") >= 0
    expected_data = {"output": str(output), "kind": "slices", "count": 1, "slices": 1, "shape": [5, 256]}
    assert data == {**expected_data, "skipped": [], "unreadable": {}}


def test_embed_skips_what_cannot_be_cut_in_a_folder(cli: Cli, slice_bundle: Bundle, tmp_path: Path) -> None:
    bundle, folder, output = slice_bundle("v2_6"), tmp_path / "images", tmp_path / "f.npy"
    folder.mkdir()
    for name in ("a", "b", "d"):
        (folder / f"{name}.png").write_bytes(b"no image")
    for name in ("c", "e"):
        (folder / f"{name}.png").write_bytes(SMALL.read_bytes())
    done = cli("embed", bundle, folder, "-o", output, "--quiet", "--json", "--batch-size", "2", *ONE)
    assert (done.status, done.data["count"]) == (0, 2)
    assert done.err.startswith("warning: 3 images skipped, which cannot be read: ")
    assert [row["item"] for row in npy_metadata(output)["rows"]] == [str(folder / "c.png"), str(folder / "e.png")]
    first, second = np.load(output)
    assert np.array_equal(first, second)
    (folder / "c.png").unlink()
    (folder / "e.png").unlink()
    cli("embed", bundle, folder, "-o", output, "--quiet", "--overwrite", *ONE).refused(3, "none of the 3 images")
    assert len(np.load(output)) == 2


@pytest.mark.parametrize("variant", ["v2_6", "omnilmm"])
def test_inspect_tells_how_images_are_cut(cli: Cli, slice_bundle: Bundle, variant: str) -> None:
    bundle = cli("inspect", slice_bundle(variant), "--json").data["preparation"]["image"]
    spec = load(slice_bundle(variant)).slices.spec
    assert bundle["mode"]["value"] == spec.mode
    assert bundle["placeholder.source"]["value"] == list(spec.placeholder.source)
    checkpoint = cli("inspect", FOLDER.parent / variant, "--json").data["preparation"]["image"]
    assert list(checkpoint) == list(bundle)
    origins = {name: entry["from"] for name, entry in bundle.items()}
    assert "the family's convention" not in origins.values()
    assert origins["size_pixels"].startswith("config.json: ")
    printed = cli("inspect", slice_bundle(variant)).out
    assert "image.placeholder.row_separator" in printed


def test_embed_parquet(cli: Cli, slice_bundle: Bundle, tmp_path: Path) -> None:
    import pyarrow.parquet

    output = tmp_path / "f.parquet"
    assert cli("embed", slice_bundle("v2_0"), WIDE, "-o", output, "--quiet", *ONE).status == 0
    table = pyarrow.parquet.read_table(output)
    assert table["features"].combine_chunks().to_numpy_ndarray().shape == (3, 9, 128)
    assert table["item"].to_pylist() == [str(WIDE)] * 3


def test_embed_refuses(cli: Cli, slice_bundle: Bundle, tmp_path: Path) -> None:
    bundle, output, text = slice_bundle("v2_6"), tmp_path / "f.npy", tmp_path / "a.txt"
    text.write_text("a cat\n", encoding="utf-8")
    cli("embed", bundle, text, "-o", output).refused(3, "takes no texts")
    cli("embed", bundle, SMALL, "-o", tmp_path / "f.npz").refused(2, ".npy or .parquet")
    cli("embed", bundle, SMALL, text.parent / "b.png", "-o", output).refused(2, "b.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(SMALL.read_bytes()[:300])
    cli("embed", bundle, SMALL, broken, "-o", output, "--quiet").refused(3, "broken.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "broken.png"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_search_refuses_features(cli: Cli, slice_bundle: Bundle, pair: Path, suffix: str, tmp_path: Path) -> None:
    features = tmp_path / f"f{suffix}"
    assert cli("embed", slice_bundle("v2_0"), SMALL, "-o", features, "--quiet", *ONE).status == 0
    for bundle in (pair, slice_bundle("v2_0")):
        cli("search", bundle, features, "a cat").refused(3, "nothing in it to search", features.name)


def test_other_verbs_name_the_right_ones(cli: Cli, slice_bundle: Bundle, pair: Path, tmp_path: Path) -> None:
    embeddings, bundle = tmp_path / "e.npy", slice_bundle("v2_6")
    assert cli("embed", pair, SMALL, "-o", embeddings, "--quiet", *ONE).status == 0
    for arguments in (
        ["classify", bundle, SMALL, "a", "b"],
        ["search", bundle, embeddings, "a"],
        ["search", bundle, embeddings, "a", "--rerank"],
        ["caption", bundle, SMALL],
        ["ask", bundle, SMALL, "what"],
        ["match", bundle, SMALL, "a"],
    ):
        cli(*arguments).refused(3, "this bundle cannot", "it can make features of an image's slices")


def test_inspect_prints_the_slices(cli: Cli, slice_bundle: Bundle) -> None:
    lines = cli("inspect", WIDE, "--bundle", slice_bundle("v2_6")).out.splitlines()
    assert lines[0] == f"{WIDE}: 100 x 50 pixels, seen whole, and 2 x 1 slices of it"
    assert " ".join(lines[2].split()) == "0 whole 84 x 42 6 x 3 = 18"
    assert " ".join(lines[4].split()) == "2 row 1, column 2 56 x 56 4 x 4 = 16"
    assert lines[5] == "tokens for the language model: 3 x 5 = 15"
    assert lines[6].endswith("<image_id>0</image_id><image>[0]</image><slice>[1]</slice><slice>[2]</slice>")
    one_line = cli("inspect", WIDE, "--bundle", slice_bundle("v2_0")).out.splitlines()
    assert one_line[6].endswith("<slice><image>[1]</image><image>[2]</image></slice>\\n")
    assert "not cut" in cli("inspect", WIDE, "--bundle", slice_bundle("v1_0")).out


def test_inspect_json(cli: Cli, slice_bundle: Bundle) -> None:
    bundle = slice_bundle("v2_6")
    data = cli("inspect", WIDE, "--bundle", bundle, "--json").data
    (features,) = load(bundle, threads=1).features(WIDE)
    assert data == {
        "what": "slices",
        "image": str(WIDE),
        "model": bundle.name,
        "size": [100, 50],
        "grid": {"columns": 2, "rows": 1},
        "slices": [{"size": [84, 42], "patches": [3, 6]}, *[{"size": [56, 56], "patches": [4, 4]}] * 2],
        "tokens_per_slice": 5,
        "tokens": features.image_features[..., 0].size,
        "placeholder": list(features.parts()),
        "query_token": "<unk>",
    }


def test_inspect_draws(cli: Cli, slice_bundle: Bundle, tmp_path: Path) -> None:
    output, bundle = tmp_path / "slices.png", slice_bundle("v2_6")
    assert cli("inspect", WIDE, "--bundle", bundle, "-o", output).out.splitlines()[-1] == f"drawing: {output}"
    with Image.open(output) as drawing:
        # Both panels, 640 pixels wide, below each other.
        assert drawing.format == "PNG"
        assert drawing.width >= 640
        assert drawing.height >= 2 * 320
    again = ("inspect", WIDE, "--bundle", bundle, "-o", output, "--json")
    cli(*again).refused(2, "the output exists", "--overwrite")
    assert cli(*again, "--overwrite").data["output"] == str(output)
    assert [path.name for path in tmp_path.iterdir()] == ["slices.png"]


def test_inspect_refuses(cli: Cli, slice_bundle: Bundle, pair: Path, tmp_path: Path) -> None:
    bundle, copy = slice_bundle("v2_6"), Path(shutil.copy(WIDE, tmp_path / "copy.png"))
    cli("inspect", WIDE, "--bundle", pair).refused(3, "cuts no images", "into slices or tiles")
    cli("inspect", WIDE, "--bundle", tmp_path).refused(3, "not a bundle")
    cli("inspect", "nowhere.png", "--bundle", bundle).refused(3, "nowhere.png")
    cli("inspect", WIDE, "-o", "a.png").refused(2, "--bundle")
    cli("inspect", WIDE, "--overwrite").refused(2, "--bundle")
    cli("inspect", WIDE, "--bundle", bundle, "--revision", "main").refused(2, "--revision")
    cli("inspect", WIDE, "--bundle", bundle, "-o", "a.jpg").refused(2, "a .png")
    cli("inspect", WIDE, "--bundle", bundle, "-o", tmp_path / "no" / "a.png").refused(4, "cannot be written")
    cli("inspect", copy, "--bundle", bundle, "-o", copy).refused(2, "would replace the image")
    assert copy.read_bytes() == WIDE.read_bytes()


def test_slices_need_no_torch(spawn: Callable[..., Any], slice_bundle: Bundle, tmp_path: Path) -> None:
    bundle, output = slice_bundle("v2_6"), tmp_path / "f.npy"
    embedded = spawn("embed", bundle, WIDE, "-o", output, "--quiet", *ONE, code=NO_TORCH)
    assert (embedded.status, embedded.err) == (0, "")
    drawn = spawn("inspect", WIDE, "--bundle", bundle, "-o", tmp_path / "s.png", code=NO_TORCH)
    assert (drawn.status, drawn.err) == (0, "")
