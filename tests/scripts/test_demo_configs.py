"""The committed configs of the demos are what their scripts write for the committed checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from demo import blip_files, files, nanovlm_files
from demo.checkpoint import load_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def clip_demo(folder: Path) -> None:
    where = files.DemoFiles(folder)
    files.write_config(where, load_model(where.checkpoint))


def blip_demo(folder: Path, name: str) -> None:
    where = blip_files.BlipDemoFiles(folder)
    blip_files.write_config(where, name, load_model(where.checkpoint(name)))


def nanovlm_demo(folder: Path) -> None:
    where = nanovlm_files.NanoVlmDemoFiles(folder)
    nanovlm_files.write_config(where, load_model(where.checkpoint))


WRITERS: dict[str, Callable[[Path], None]] = {
    files.NAME: clip_demo,
    blip_files.CAPTION: lambda folder: blip_demo(folder, blip_files.CAPTION),
    blip_files.VQA: lambda folder: blip_demo(folder, blip_files.VQA),
    nanovlm_files.NAME: nanovlm_demo,
}


def test_every_demo_is_held() -> None:
    local = {path.stem for path in CONFIGS.glob("*.yaml") if "file: demo/" in path.read_text(encoding="utf-8")}
    assert set(WRITERS) == local


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", WRITERS)
def test_config_is_what_its_script_writes(name: str, tmp_path: Path) -> None:
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    WRITERS[name](tmp_path)
    assert (tmp_path / f"{name}.yaml").read_text(encoding="utf-8") == (CONFIGS / f"{name}.yaml").read_text(
        encoding="utf-8"
    )
