"""The second engine; that it computes what the first does is shown by the full sweeps of tests/exporting/lowerings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlm_export.errors import EnvironmentFailure
from vlm_export.runtime.engines.openvino import OpenVinoEngine


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentFailure) as caught:
        OpenVinoEngine(tmp_path / "graph.onnx")
    assert caught.value.exit_status == 4
    assert "pip install '.[openvino]'" in caught.value.fix
