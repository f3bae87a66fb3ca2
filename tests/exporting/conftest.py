from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import ExportResult, export_bundle

# The faults that scripts/planted_faults.py plants.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "clip" / "vit_p14" / "state_dict_fp16.pt"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The smallest checkpoint of the oracle: 42 pixels, 20 tokens, a vocabulary of 200, half precision."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def export_fast() -> Callable[..., ExportResult]:
    """`export_bundle` with the TorchScript back end, which takes a fraction of a second; fields of ExportOptions."""

    def export(source: str | Path, target: Path, **options: Any) -> ExportResult:
        defaults: dict[str, Any] = {"opset": 17, "with_tokenizer": False, "threads": 1}
        return export_bundle(str(source), target, ExportOptions(**{**defaults, **options}))

    return export


@pytest.fixture(scope="session")
def default_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the default options; tests must not change it."""
    target = tmp_path_factory.mktemp("default") / "bundle"
    export_bundle(str(CHECKPOINT), target, ExportOptions(with_tokenizer=False, threads=1))
    return target


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a directory, temporary ones included, by relative path."""

    def take(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return take
