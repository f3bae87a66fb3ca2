"""The committed configs of the demos are what their scripts write for the committed checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo.files import CONFIGS, DEMOS, Demo, DemoFiles


def test_every_demo_is_held() -> None:
    local = {path.stem for path in CONFIGS.glob("*.yaml") if "file: demo/" in path.read_text(encoding="utf-8")}
    assert {demo.name for demo in DEMOS} == local


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_config_is_what_its_script_writes(demo: Demo, tmp_path: Path) -> None:
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    written = DemoFiles(demo, tmp_path)
    written.write_config()
    assert written.config.read_text(encoding="utf-8") == DemoFiles(demo).config.read_text(encoding="utf-8")
