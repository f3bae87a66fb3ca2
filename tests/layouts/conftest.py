"""Packages of the demo bundle, made once for each consumer; tests must not change them."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_export.layouts.package import package

ROOT = Path(__file__).resolve().parents[2]
# The browser's driver, which is not installed.
sys.path.insert(0, str(ROOT / "scripts"))


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


@pytest.fixture(scope="session")
def siglip_tests() -> SimpleNamespace:
    """What makes tiny SigLIP checkpoints of random weights, as transformers saves them."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "models" / "test_siglip.py")))
