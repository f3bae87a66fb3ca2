"""Packages of the demo bundle, made once for each consumer; tests must not change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_export.layouts.package import package


@pytest.fixture(scope="session")
def packaged(shared_bundle: Callable[..., Path], demo: Path) -> Callable[[str], Path]:
    """`packaged(consumer)`: the demo bundle packaged for it."""

    def make(consumer: str) -> Path:
        return shared_bundle(f"for-{consumer}", lambda target: package(demo, target, consumer, threads=1))

    return make
