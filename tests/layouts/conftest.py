"""Packages of the demo bundle, made once for each consumer; tests must not change them."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
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
def consumers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the environments of other software, which `VLM_EXPORT_CONSUMERS` may name to keep them."""
    stated = os.environ.get("VLM_EXPORT_CONSUMERS")
    folder = Path(stated) if stated else tmp_path_factory.mktemp("consumers")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checked_install(command: Sequence[str | Path], **options: Any) -> None:
    """Skips, and says what failed, where the registry cannot be reached; anything else is an error."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        if re.search(r"resol|connect|network|ENOTFOUND|EAI_AGAIN|timed out", said, re.IGNORECASE):
            pytest.skip(f"the package registry cannot be reached: {said.splitlines()[-1]}")
        raise AssertionError(said)


@pytest.fixture(scope="session")
def python_with(consumers: Path) -> Callable[..., Path]:
    """`python_with("name", "package==1.0", …)`: the interpreter of an environment of that name that has these."""

    def make(name: str, *requirements: str) -> Path:
        home = consumers / name
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not (home / "ready").exists():
            here = (shutil.which("uv"), ROOT / ".venv-uv" / "bin" / "uv")
            uv = next((path for path in here if path and Path(path).exists()), "")
            if uv:
                checked_install([uv, "venv", "--clear", "--python", sys.executable, home])
                checked_install([uv, "pip", "install", "--python", python, *requirements])
            else:
                checked_install([sys.executable, "-m", "venv", "--clear", home])
                checked_install([python, "-m", "pip", "install", *requirements])
            (home / "ready").touch()
        return python

    return make


@pytest.fixture(scope="session")
def node_with(consumers: Path) -> Callable[..., Path]:
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
