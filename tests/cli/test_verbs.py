"""What each verb prints and writes when all is well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export.cli.output import print_table

Cli = Callable[..., Any]


def test_inspect_a_checkpoint(cli: Cli, checkpoint: Path) -> None:
    data = cli("inspect", checkpoint, "--json").data
    assert (data["what"], data["family"], data["format"]) == ("checkpoint", "clip", "state_dict")
    assert data["files"][0]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert [part["name"] for part in data["parts"]] == ["vision", "text"]
    assert data["architecture"]["vision"]["image_size"] == 42
    assert any("half-precision" in note for note in data["notes"])
    assert any("no tokenizer" in note for note in data["notes"])
    text = cli("inspect", checkpoint)
    assert text.status == 0
    for part in ("checkpoint: ", "clip", "pixel_values float32 (batch, 3, 42, 42)", "parameters", "note: "):
        assert part in text.out


def test_inspect_a_bundle(cli: Cli, exported: Path) -> None:
    data = cli("inspect", exported, "--json").data
    assert (data["what"], data["family"], data["source"]) == ("bundle", "clip", "state_dict_fp16.pt")
    (variant,) = data["parts"][0]["variants"]
    assert (variant["precision"], variant["opset"], variant["verification"]) == ("fp32", 17, {"passed": True})
    assert variant["oldest_onnxruntime"] == "1.15.1"
    printed = cli("inspect", exported).out
    assert "fp32 opset 17 (torchscript), ONNX" in printed
    assert "Runtime ≥ 1.15.1" in printed
    assert [task["kind"] for task in data["tasks"]] == ["embed"]
    assert "tasks: embed" in printed
    # Graphs first; what verify repeats is one line.
    assert printed.index(" onnx/") < printed.index(" config.json ") < printed.index(" golden/ ")
    assert printed.count("golden/") == 1


def test_export_prints_a_table_and_its_progress(
    cli: Cli, checkpoint: Path, tmp_path: Path, fast: tuple[str, ...]
) -> None:
    result = cli("export", checkpoint, "-o", tmp_path / "bundle", *fast)
    assert result.status == 0
    assert "image_embeds" in result.out
    assert "pass" in result.out
    assert str(tmp_path / "bundle") in result.out
    for stage in ("read", "load weights", "export vision", "verify text", "publish"):
        (line,) = [line for line in result.err.splitlines() if line.startswith(f"{stage} ")]
        assert line.split()[-1] == "MiB" or line.rstrip().endswith("s")


def test_export_as_json(cli: Cli, checkpoint: Path, tmp_path: Path, fast: tuple[str, ...]) -> None:
    result = cli("export", checkpoint, "-o", tmp_path / "bundle", "--json", "--quiet", *fast)
    assert (result.status, result.err) == (0, "")
    data = result.data
    assert data["manifest"] == json.loads((tmp_path / "bundle" / "vlm_export.json").read_text())
    assert [report["passed"] for report in data["verification"]] == [True, True]
    assert {"read", "publish"} <= {stage["name"] for stage in data["stages"]}


def test_export_options_reach_the_bundle(cli: Cli, checkpoint: Path, tmp_path: Path, image_path: Path) -> None:
    target = tmp_path / "bundle"
    options = [
        "--opset",
        "14",
        "--no-simplify",
        "--external-data-threshold",
        "0",
        "--image",
        image_path,
        "--threads",
        "1",
    ]
    tokenizer = ["--threads", "1", "--no-tokenizer", "--sha256", hashlib.sha256(checkpoint.read_bytes()).hexdigest()]
    data = cli("export", checkpoint, "-o", target, "--json", "--quiet", *options, *tokenizer).data
    (variant,) = data["manifest"]["parts"][0]["variants"]
    assert (variant["opset"], variant["exporter"], variant["simplified"]) == (14, "torchscript", False)
    assert variant["external_data"] == ["onnx/vision_model.onnx_data"]
    again = cli("export", checkpoint, "-o", target, "--overwrite", "--opset", "17", "--no-tokenizer", "--quiet")
    assert again.status == 0
    assert not list(target.rglob("*.onnx_data"))


def test_verify_with_the_golden_records(cli: Cli, exported: Path) -> None:
    data = cli("verify", exported, "--json", "--threads", "1").data
    assert data["passed"] is True
    assert [report["part"] for report in data["verification"]] == ["vision", "text"]
    result = cli("verify", exported)
    assert result.status == 0
    assert "pass" in result.out


def test_verify_against_the_source(cli: Cli, exported: Path, checkpoint: Path) -> None:
    result = cli("verify", exported, "--source", checkpoint, "--json", "--threads", "1")
    assert result.status == 0
    rows = [(check["stage"], check["variant"]) for check in result.data["contract"]["checks"]]
    assert len(set(rows)) == len(rows)
    assert all(report["points"]["grid"] >= 4 for report in result.data["verification"])


def test_classify(cli: Cli, pair: Path, image_path: Path) -> None:
    labels = ["red", "blue", "a square"]
    result = cli("classify", pair, image_path, *labels, "--template", "a {}", "--json", "--threads", "1")
    found = result.data["labels"]
    assert sorted(entry["label"] for entry in found) == sorted(labels)
    shares = [entry["probability"] for entry in found]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert shares == sorted(shares, reverse=True)
    table = cli("classify", pair, image_path, *labels, "--template", "a {}")
    assert table.status == 0
    assert table.out.splitlines()[1].endswith(found[0]["label"])


def test_embed_and_search_images(cli: Cli, pair: Path, image_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "deeper"
    folder.mkdir(parents=True)
    (folder / "notes.md").write_text("no image")
    (folder / "copy.png").write_bytes(image_path.read_bytes())
    for name, colour in (("red.png", "red"), ("blue.JPG", "blue")):
        Image.new("RGB", (30, 40), colour).save(tmp_path / "images" / name)
    output = tmp_path / "images.npy"
    done = cli("embed", pair, tmp_path / "images", "-o", output, "--json", "--quiet", "--threads", "1")
    assert done.status == 0
    assert done.err == "warning: 1 file skipped, not named as an image that is read: notes.md\n"
    assert (done.data["kind"], done.data["count"]) == ("image", 3)
    assert done.data["skipped"] == [str(folder / "notes.md")]
    vectors = np.load(output)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    matches = cli("search", pair, output, image_path, "-k", "2", "--json").data["matches"]
    assert len(matches) == 2
    assert matches[0]["item"].endswith("copy.png")
    assert matches[0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert cli("search", pair, output, "something red").status == 0


def test_embed_skips_what_cannot_be_read_in_a_folder(cli: Cli, pair: Path, image_path: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "images", tmp_path / "x.npy"
    folder.mkdir()
    for name in ("b.png", "d.png"):
        (folder / name).write_bytes(image_path.read_bytes())
    (folder / "a.png").write_bytes(b"no image")
    (folder / "c.png").write_bytes(image_path.read_bytes()[:100])
    embed = ("embed", "-o", output, "--quiet", "--batch-size", "1", "--threads", "1", pair, folder)
    for more in (["--on-error", "stop"], [folder / "a.png"]):
        cli(*embed, *more).refused(3, str(folder / "a.png"))
        assert not output.exists()
    done = cli(*embed, "--json")
    bad = [str(folder / "a.png"), str(folder / "c.png")]
    assert (done.status, done.data["count"], done.data["skipped"]) == (0, 2, bad)
    assert list(done.data["unreadable"]) == bad
    assert done.err.startswith("warning: 2 images skipped, which cannot be read: ")
    assert all(path in done.err for path in bad)
    assert len(np.load(output)) == 2
    items = {match["item"] for match in cli("search", pair, output, "a cat", "--json").data["matches"]}
    assert items == {str(folder / "b.png"), str(folder / "d.png")}
    for name in ("b.png", "d.png"):
        (folder / name).write_bytes(b"")
    cli(*embed, "--overwrite").refused(3, "none of the 4 images")
    assert len(np.load(output)) == 2


def test_search_refuses_paths_that_lead_nowhere(cli: Cli, pair: Path, image_path: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "v.npy"
    assert cli("embed", pair, image_path, "-o", vectors, "--quiet").status == 0
    for query in ("/nonexistent/pic.png", "pic.JPG", "my images/a cat.png", "/nonexistent/pic", "../pic"):
        cli("search", pair, vectors, query).refused(3, "no such file", "--text", query)
        assert cli("search", pair, vectors, query, "--text", "--truncate", "--json").data["query_kind"] == "text"
    for query in ("a b.png", "black/white", "a cat.", "x" * 300):
        assert cli("search", pair, vectors, query, "--truncate", "--json").data["query_kind"] == "text"


def test_search_cuts_long_texts_if_asked(cli: Cli, pair: Path, image_path: Path, tmp_path: Path) -> None:
    vectors, words = tmp_path / "v.npy", "cat " * 500
    assert cli("embed", pair, image_path, "-o", vectors, "--quiet").status == 0
    cli("search", pair, vectors, words).refused(3)
    assert cli("search", pair, vectors, words, "--truncate").status == 0


def test_embed_and_search_texts(cli: Cli, pair: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("a red circle\n\n  two blue squares \nnothing\n", encoding="utf-8")
    output = tmp_path / "texts.npy"
    done = cli("embed", pair, lines, "-o", output, "--quiet")
    assert done.status == 0
    assert done.out.startswith("3 text embeddings")
    matches = cli("search", pair, output, "two blue squares", "-k", "1", "--json").data["matches"]
    assert matches[0]["item"] == "two blue squares"


def test_embed_shows_progress_on_stderr_only(cli: Cli, pair: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    done = cli("embed", pair, lines, "-o", tmp_path / "x.npy", "--json")
    assert done.data["count"] == 2
    assert "text" in done.err


def test_inspect_says_which_file_states_each_value(
    cli: Cli, tmp_path: Path, make_huggingface_clip: Callable[..., Any]
) -> None:
    folder = tmp_path / "model"
    make_huggingface_clip(folder)
    edges = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    section = {"image_processor_type": "CLIPImageProcessor", **edges, "image_mean": [0.5, 0.5, 0.5], "resample": 2}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": section}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0]}))
    preparation = cli("inspect", folder, "--json").data["preparation"]
    where = "processor_config.json: image_processor."
    assert preparation["image"]["mean"] == {"value": [0.5, 0.5, 0.5], "from": f"{where}image_mean"}
    assert preparation["image"]["resize_pixels"] == {"value": [30], "from": f"{where}size"}
    assert preparation["image"]["resample"] == {"value": "bilinear", "from": f"{where}resample"}
    assert preparation["image"]["std"]["from"] == "default of CLIPImageProcessor"
    assert all(entry["from"] != "the family's convention" for entry in preparation["image"].values())
    assert "transformers reads instead" in preparation["ignored_files"]["preprocessor_config.json"]
    text = cli("inspect", folder).out
    assert "not read: preprocessor_config.json" in text
    assert "image.transparency" in text


def test_tables_of_inspect_fit_the_terminal(cli: Cli, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, source in ((80, pair), (60, pair), (80, "nanovlm-460m-8k")):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = cli("inspect", source).out.splitlines()
        tables = [line for line in lines[lines.index("architecture:") :] if not line.startswith("note: ")]
        assert len(tables) > 20
        assert max(map(len, tables)) <= columns


def test_cells_go_on_below_within_their_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("  one-two three", "x" * 50), ("  four", "words that go on and on")]
    print_table(("a", "b"), rows, width=40)
    assert capsys.readouterr().out.splitlines() == [
        "a                b",
        "  one-two three  " + "x" * 23,
        " " * 17 + "x" * 23,
        " " * 17 + "xxxx",
        "  four           words that go on and on",
    ]


def test_index_and_search_it(cli: Cli, pair: Path, tmp_path: Path) -> None:
    colours = ("red", "green", "blue", "white")
    for colour in colours:
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
    rows = [f"{tmp_path / colour}.png,{colour},{len(colour)}" for colour in colours]
    (tmp_path / "table.csv").write_text("\n".join(["path,colour,size", *rows]))
    embeddings, index = tmp_path / "embeddings", tmp_path / "e.index"
    cli("embed", pair, tmp_path / "table.csv", "-o", embeddings, "--keep", "colour", "--keep", "size", "--quiet")
    built = cli("index", embeddings, "-o", index, "--json")
    assert {**built.data, "seconds": 0} == {
        **{"index": str(index), "kind": "image", "model": "tiny", "count": 4, "dimension": 12},
        **{"columns": ["colour", "size"], "lists": None, "seconds": 0},
    }
    cli("index", embeddings, "-o", index).refused(2, "output exists")
    assert "exact, as it was written" in cli("index", index, "--verify").out
    for source in (index, embeddings):
        blue = str(tmp_path / "blue.png")
        best = cli("search", pair, source, blue, "-k", "1", "--json").data["matches"][0]
        assert (best["item"], best["columns"]) == (blue, {"colour": "blue", "size": "4"})
        found = cli("search", pair, source, "a cat", "--where", "colour=red|white", "--where", "size>3", "--json").data
        assert [match["item"] for match in found["matches"]] == [str(tmp_path / "white.png")]
    page = tmp_path / "page.html"
    shown = cli("search", pair, index, "a cat", "--image", tmp_path / "red.png", "--weight", "1", "--html", page)
    assert shown.out.splitlines()[0].split() == ["cosine", "colour", "size", "image"]
    assert "red.png" in shown.out.splitlines()[1]
    assert page.read_text().count("data:image/jpeg") == 5
    cli("search", pair, index, "a cat", "--html", page).refused(2, "output exists")
    data = cli("search", pair, index, "a cat", "--image", tmp_path / "red.png", "--json").data
    assert (data["query_kind"], data["query"], data["image"]) == ("image and text", "a cat", str(tmp_path / "red.png"))
    assert cli("search", pair, index, "--image", tmp_path / "red.png", "--json").data["query_kind"] == "image"


def test_search_and_index_refuse_what_contradicts_itself(
    cli: Cli, pair: Path, image_path: Path, tmp_path: Path
) -> None:
    vectors = tmp_path / "images.npy"
    cli("embed", pair, image_path, "-o", vectors, "--quiet")
    cli("search", pair, vectors).refused(2, "nothing to look for")
    cli("search", pair, vectors, "a cat", "--weight", "0.5").refused(2, "a text and an image")
    cli("search", pair, vectors, image_path, "--image", image_path).refused(2, "two images")
    cli("search", pair, vectors, "a cat", "--where", "colour=red").refused(2, "no such column", "--keep")
    cli("index", vectors).refused(2, "built or verified")
    cli("index", vectors, "--verify").refused(3, "no index")
    cli("index", vectors, "-o", tmp_path / "x.index", "--verify").refused(2, "built or verified")
    cli("index", tmp_path / "absent.npy", "-o", tmp_path / "x.index").refused(3, "no embeddings")
