"""What CLIP weights do not say about themselves: warnings, and the options that say it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_export.checkpoint.sources.known import packaged_path

Cli = Callable[..., Any]
MARKS = ("input_resolution", "context_length", "vocab_size")


@pytest.fixture
def silent(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as a training script saves it: without what OpenAI's archives carry besides weights."""
    weights = torch.load(checkpoint, weights_only=True)
    path = tmp_path / "silent" / "epoch_1.pt"
    path.parent.mkdir()
    torch.save({"state_dict": {key: value for key, value in weights.items() if key not in MARKS}}, path)
    return path


def warnings_of(result: Any) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("warning: ")]


def test_export_and_inspect_say_what_is_assumed(cli: Cli, silent: Path, tmp_path: Path, fast: tuple[str, ...]) -> None:
    target = tmp_path / "bundle"
    result = cli("export", silent, "-o", target, "--json", "--quiet", *fast)
    (line,) = warnings_of(result)
    for text in (
        "QuickGELU",
        "--set activation=gelu",
        "--set head_width=",
        "--set text_heads=",
        "open_clip_config.json",
    ):
        assert text in line
    assert result.data["manifest"]["export"]["warnings"] == [line.removeprefix("warning: ")]
    for source in (silent, target):
        inspected = cli("inspect", source, "--json")
        assert warnings_of(inspected) == [line]
        assert inspected.data["warnings"] == [line.removeprefix("warning: ")]
    manifest = json.loads((target / "vlm_export.json").read_text())
    manifest["export"]["warnings"] = 5
    (target / "vlm_export.json").write_text(json.dumps(manifest))
    cli("inspect", target).refused(3, "'warnings'")


def test_options_say_it_and_verification_repeats_them(
    cli: Cli, silent: Path, tmp_path: Path, fast: tuple[str, ...]
) -> None:
    target = tmp_path / "bundle"
    options = ["--set", "activation=gelu", "--set", "head_width=32", "--set", "text_heads=4"]
    result = cli("export", silent, "-o", target, "--json", "--quiet", *options, *fast)
    assert (result.status, result.err) == (0, "")
    manifest = result.data["manifest"]
    assert manifest["architecture"]["activation"] == "gelu"
    assert manifest["architecture"]["text"]["heads"] == 4
    told = {"activation": "gelu", "head_width": 32, "text_heads": 4}
    assert manifest["export"]["build"]["family_options"] == told
    assert manifest["export"]["warnings"] == []
    assert cli("verify", target, "--source", silent, "--quiet").status == 0


def test_a_config_beside_the_weights_is_part_of_the_source(
    cli: Cli, silent: Path, tmp_path: Path, fast: tuple[str, ...]
) -> None:
    target, config = tmp_path / "bundle", silent.parent / "open_clip_config.json"
    architecture = cli("inspect", silent, "--json", "--quiet").data["architecture"]
    vision, text = architecture["vision"], architecture["text"]
    stated = {
        "embed_dim": architecture["embed_dim"],
        "vision_cfg": {key: vision[key] for key in ("layers", "width", "patch_size", "image_size")},
        "text_cfg": {key: text[key] for key in ("layers", "width", "heads", "context_length", "vocab_size")},
    }
    config.write_text(json.dumps({"model_cfg": stated, "preprocess_cfg": {"mean": 0.5, "std": 0.25}}))
    result = cli("export", silent.parent, "-o", target, "--json", "--quiet", *fast)
    assert (result.status, result.err) == (0, "")
    manifest = result.data["manifest"]
    assert [file["name"] for file in manifest["source"]["files"]] == ["epoch_1.pt", config.name]
    assert manifest["image"]["mean"] == [0.5] * 3
    assert manifest["architecture"]["text_cfg"]["heads"] == text["heads"]
    assert cli("verify", target, "--source", silent.parent, "--quiet").status == 0
    config.write_text("{")
    cli("inspect", silent).refused(3, config.name)
    config.unlink()
    cli("verify", target, "--source", silent, "--quiet").refused(3, "not the checkpoint")


def test_nothing_is_assumed_about_known_files(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    demo = shutil.copy(packaged_path("demo/clip-demo.pt"), tmp_path / "renamed.pt")
    for source in (demo, "clip-demo", checkpoint, checkpoint.parents[1] / "rn_tiny" / "jit_archive.pt"):
        result = cli("inspect", source, "--json")
        assert (result.status, result.err, result.data["warnings"]) == (0, "", [])


@pytest.mark.parametrize("option", ["activation=gelu", "head_width=64", "text_heads=2"])
def test_options_are_refused_where_they_say_nothing(
    cli: Cli, checkpoint: Path, tmp_path: Path, fast: tuple[str, ...], option: str
) -> None:
    data = checkpoint.parents[2]
    sources = (
        "clip-demo",
        packaged_path("demo/clip-demo.pt"),
        checkpoint,
        checkpoint.parents[1] / "rn_tiny" / "jit_archive.pt",
        next((data / "blip" / "caption").glob("*.pth")),
    )
    for source in sources:
        result = cli("export", source, "-o", tmp_path / "bundle", *fast, "--set", option)
        result.refused(2, "--set", option, "leave these options out")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("activation=silu", ("activation=silu", "'quick_gelu', 'gelu'")),
        ("head_width=0", ("head_width=0", "an integer at least 1")),
        ("head_width=wide", ("head_width=wide", "an integer at least 1")),
        ("heads=4", ("heads=4", "activation", "head_width", "text_heads")),
        ("activation", ("'activation' is not NAME=VALUE",)),
        ("=gelu", ("'=gelu' is not NAME=VALUE",)),
    ],
)
def test_options_and_values_are_named(
    cli: Cli, silent: Path, tmp_path: Path, fast: tuple[str, ...], option: str, texts: tuple[str, ...]
) -> None:
    cli("export", silent, "-o", tmp_path / "bundle", "--set", option, *fast).refused(2, "--set", *texts)
    assert not (tmp_path / "bundle").exists()


def test_inspect_lists_the_options_of_the_family(cli: Cli, silent: Path, checkpoint: Path) -> None:
    data = cli("inspect", silent, "--json").data
    assert set(data["options"]) == {"activation", "head_width", "text_heads"}
    assert "option: --set activation=…: one of 'quick_gelu', 'gelu'" in cli("inspect", silent).out
    blip = next((checkpoint.parents[2] / "blip" / "caption").glob("*.pth"))
    assert cli("inspect", blip, "--json").data["options"] == {}
