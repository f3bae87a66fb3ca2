"""The page of the benchmark `vision`, of made figures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vlm_export.lab.bench_plan import BenchOptions, Load, Side
from vlm_export.lab.bench_result import BenchResult, Cost, Measured


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "scripts"))
    return import_module


def test_the_page_names_the_fastest_within_the_bound(scripts: Any) -> None:
    vision = scripts("benchmarks.vision")
    speeds = {
        Side("torch", "eager", 2): (1.0, 0.0),
        Side("onnxruntime", "int8", 2, "int8.onnx"): (0.25, 1e-4),
        Side("openvino", "bf16", 2): (0.2, 1e-5),
        Side("openvino", "int4", 2): (0.1, 0.1),
    }
    load = Load("vision", 4, None)
    found = BenchResult(
        "bundle",
        ("embed",),
        BenchOptions(),
        tuple(Measured(side, load, (seconds,)) for side, (seconds, _) in speeds.items()),
        tuple(Cost(side, "vision", 1.0, 1 << 20, 1, 1, 1 - lost) for side, (_, lost) in speeds.items()),
    )
    page = vision.report_from_result("a-model", found, [{"form": "fp32", "ms": {"MatMul": 3.0, "Add": 1.0}}], 2)
    assert page.conclusion == "5.00 times (openvino bf16), in ONNX Runtime 4.00 times (onnxruntime int8)."
    assert not page.reached
    assert page.tables[1].rows == [("MatMul", "3.0", "75%"), ("Add", "1.0", "25%")]
