"""Packages of the demo bundle, made once for each consumer; tests must not change them."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vlm_export
from vlm_export.layouts.package import package

ROOT = Path(__file__).resolve().parents[2]
# The browser's driver, which is not installed.
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def demo_from_uint8(shared_bundle: Callable[..., Path]) -> Path:
    """The demo checkpoint with its preprocessing in a graph too, and its weights beside the graphs, float32; tests must
    not change it."""

    def export(target: Path) -> None:
        options: dict[str, Any] = {"exporter": "torchscript", "opset": 18, "threads": 1}
        vlm_export.export("clip-demo", target, with_preprocessing=True, external_data_threshold_bytes=0, **options)

    return shared_bundle("clip-demo-from-uint8", export)


@pytest.fixture(scope="session")
def packaged(shared_bundle: Callable[..., Path], demo: Path) -> Callable[[str], Path]:
    """`packaged(consumer)`: the demo bundle packaged for it."""

    def make(consumer: str) -> Path:
        return shared_bundle(f"for-{consumer}", lambda target: package(demo, target, consumer, threads=1))

    return make


@pytest.fixture(scope="session")
def node_with(consumers: Path, checked_install: Callable[..., None]) -> Callable[..., Path]:
    """`node_with("name", "package@1.0", …)`: a folder whose programs find these npm packages."""

    def make(name: str, *packages: str) -> Path:
        npm = shutil.which("npm")
        if npm is None or shutil.which("node") is None:
            pytest.skip("Node.js and npm are not installed")
        home = consumers / name
        if not (home / "ready").exists():
            home.mkdir(exist_ok=True)
            (home / "package.json").write_text('{"private": true}')
            # The graphs run on the CPU, whose library comes with the package.
            skip = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
            checked_install([npm, "install", *packages], cwd=home, env={**os.environ, **skip})
            (home / "ready").touch()
        return home

    return make


@pytest.fixture(scope="session")
def siglip_tests() -> SimpleNamespace:
    """What makes tiny SigLIP checkpoints of random weights, as transformers saves them."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "models" / "test_siglip.py")))
