"""The demo checkpoint as a bundle, and with a variant of each precision; tests copy what they change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vlm_export


@pytest.fixture(scope="session")
def demo(shared_bundle: Callable[..., Path]) -> Path:
    """The exported demo checkpoint in float32; tests must not change it."""
    return shared_bundle("clip-demo-fp32", lambda target: vlm_export.export("clip-demo", target, threads=1))


@pytest.fixture(scope="session")
def quantised(demo: Path, shared_bundle: Callable[..., Path]) -> Callable[[str], Path]:
    """The demo with a variant of a precision; tests must not change it."""

    def bundle(precision: str) -> Path:
        return shared_bundle(
            f"clip-demo-{precision}",
            lambda target: vlm_export.quantize(demo, precision, output=target, threads=1),
        )

    return bundle


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    """A copy of the float32 bundle that a test may change."""
    return Path(shutil.copytree(demo, tmp_path / "copied"))
