"""How many of the package's files one command crosses: few enough that a reader can follow it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trace_files import called_files

DATA = Path(__file__).parents[1] / "data"
IMAGE = str(DATA / "blip" / "vqa" / "image.png")


def test_an_embedding_crosses_few_files(tmp_path: Path) -> None:
    names = called_files(["embed", str(DATA / "runtime" / "tiny_bundle"), IMAGE, "-o", str(tmp_path / "e.npy")])
    assert "runtime/tasks/embed.py" in names
    assert (tmp_path / "e.npy").is_file()
    assert len(names) <= 35, sorted(names)


def test_an_answer_crosses_few_files(blip_bundle: Callable[[str], Path]) -> None:
    names = called_files(["ask", str(blip_bundle("vqa")), IMAGE, "what color is the cat?", "--threads", "1"])
    assert "runtime/tasks/answer.py" in names
    assert len(names) <= 40, sorted(names)


def test_an_export_crosses_few_files(tmp_path: Path) -> None:
    # To follow the other back end takes ten times as long; it crosses the same files.
    options = ["--exporter", "torchscript", "--opset", "18", "--threads", "1", "--quiet"]
    names = called_files(["export", "clip-demo", "-o", str(tmp_path / "bundle"), *options])
    assert "exporting/pipeline.py" in names
    assert (tmp_path / "bundle" / "vlm_export.json").is_file()
    assert len(names) <= 120, sorted(names)
