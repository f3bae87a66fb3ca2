"""Packages of the demo bundle, made once for each consumer; tests must not change them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_export.layouts.package import package

# The browser's driver, which is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))


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
