"""Sizes that a manifest only claims, and paths that have a known checkpoint's name: both are said before any work."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Edit = Callable[[Callable[[dict[str, Any]], None]], Path]


@pytest.fixture
def edited(pair: Path, tmp_path: Path) -> Edit:
    """A copy of a bundle whose manifest was changed; its files are those that were exported."""

    def edit(change: Callable[[dict[str, Any]], None]) -> Path:
        root = Path(shutil.copytree(pair, tmp_path / "edited"))
        manifest = json.loads((root / "vlm_export.json").read_text())
        change(manifest)
        (root / "vlm_export.json").write_text(json.dumps(manifest))
        return root

    return edit


def signature(manifest: dict[str, Any], part: str) -> dict[str, Any]:
    (found,) = (entry["signature"] for entry in manifest["parts"] if entry["name"] == part)
    assert isinstance(found, dict)
    return found


def claim_image_size(manifest: dict[str, Any]) -> None:
    manifest["image"]["size_pixels"] = 8000


def claim_image_size_twice(manifest: dict[str, Any]) -> None:
    claim_image_size(manifest)
    signature(manifest, "vision")["inputs"][0]["shape"][2:] = [8000, 8000]


def claim_context(manifest: dict[str, Any]) -> None:
    manifest["text"]["context_length"] = 100_000


def claim_text_width(manifest: dict[str, Any]) -> None:
    signature(manifest, "text")["outputs"][0]["shape"][-1] += 1


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Nothing is made in the size that is claimed: 8000 x 8000 x 3 floats are 768 MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (claim_image_size, ("image.size_pixels", "8000 pixels", "part 'vision'")),
        (claim_image_size_twice, ("other sizes than the manifest states", "pixel_values", "8000")),
        (claim_context, ("text.context_length", "100000 tokens")),
        (claim_text_width, ("other sizes than the manifest states", "part 'text'")),
    ],
)
def test_sizes_are_compared_before_anything_is_computed(
    cli: Cli, edited: Edit, image_path: Path, claim: Callable[[dict[str, Any]], None], words: tuple[str, ...]
) -> None:
    cli("classify", edited(claim), image_path, "cat", "dog").refused(3, *words, "fix: ")


def test_a_graph_that_returns_another_width(
    cli: Cli, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither graph nor manifest fix the width, the run shows it."""
    from vlm_export.runtime.engines import onnxruntime as engine

    run, texts = engine.OrtEngine.run, tmp_path / "texts.txt"
    texts.write_text("a cat")
    monkeypatch.setattr(
        engine.OrtEngine, "run", lambda *given: {name: rows[:, 1:] for name, rows in run(*given).items()}
    )
    cli("embed", pair, texts, "-o", tmp_path / "x.npy").refused(3, "another width than the manifest states")


def test_a_path_that_hides_a_known_name_is_said(
    cli: Cli, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pair, tmp_path / "clip-demo")
    said = "./clip-demo in this directory was taken, not the known checkpoint clip-demo"
    assert cli("inspect", "clip-demo", "--json").data["notes"][0].startswith(said)
    assert said in cli("inspect", "clip-demo").out
    cli("export", "clip-demo", "-o", "out").refused(3, said, "in another directory")
    cli("export", "clip-demo", "-o", "out", "--random-weights", "1").refused(2, said)
    (tmp_path / "blip-demo-caption").write_text("no checkpoint")
    cli("inspect", "blip-demo-caption").refused(3, "not the known checkpoint blip-demo-caption")
    # Another way to name the path is no known name.
    assert said not in cli("inspect", "./clip-demo").out
