"""The demo checkpoint as a bundle, which tests copy before they change it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlm_export


@pytest.fixture(scope="session")
def demo(shared_bundle: Callable[..., Path]) -> Path:
    """The exported demo checkpoint; tests must not change it."""

    def export(target: Path) -> None:
        options: dict[str, Any] = {"exporter": "torchscript", "opset": 18, "threads": 1}
        vlm_export.export("clip-demo", target, precisions=("fp32", "fp16"), **options)

    return shared_bundle("clip-demo", export)


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(demo, tmp_path / "copied"))
