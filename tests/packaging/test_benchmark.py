"""The benchmarks measure and write their reports; their figures are not judged here."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY_BUNDLE = ROOT / "tests" / "data" / "runtime" / "tiny_bundle"
Measured = Callable[[str], dict[str, Any]]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its neighbours are importable."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark")


@pytest.fixture
def measured(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Measured:
    """The data of one quick measurement of the tiny bundle, whose page is printed too."""

    def measure(kind: str) -> dict[str, Any]:
        options = ["--bundle", str(TINY_BUNDLE), "--name", "tiny", "--rounds", "2"]
        # 1: the tiny model misses a goal that is stated for ViT-B/32.
        assert benchmark.main(["--output", str(tmp_path), kind, *options]) in (0, 1)
        page = (tmp_path / f"{kind}.md").read_text(encoding="utf-8")
        assert page == capsys.readouterr().out.removesuffix("\n")
        assert f"scripts/benchmark.py {kind}" in page
        assert ElementTree.parse(tmp_path / f"{kind}.svg").getroot().tag.endswith("svg")
        data: dict[str, Any] = json.loads((tmp_path / f"{kind}.json").read_text(encoding="utf-8"))
        assert data["machine"]["cores"] >= 1
        return data

    return measure


def test_text(measured: Measured) -> None:
    data = measured("text")
    assert [result["batch"] for result in data["results"]] == [1, 8, 32]
    assert all(result["max_abs_difference"] <= 1e-5 for result in data["results"])
    assert all(result["short_ms"] > 0 for result in data["results"])


def test_start(measured: Measured) -> None:
    data = measured("start")
    assert set(data["rounds"]) == {f"{part}, {side}" for part in ("vision", "text") for side in ("default", "earliest")}
    for side, runs in data["rounds"].items():
        assert len(runs) == 2
        assert all(len(run) == len(data["steps"]) for run in runs)
        assert data["totals"][side] == pytest.approx(statistics.median(map(sum, runs)))


def test_export(benchmark: Any, tmp_path: Path) -> None:
    options = ["--names", "clip-demo", "--precision", "fp32", "fp16", "--part", "text", "--report", "small"]
    assert benchmark.main(["--output", str(tmp_path), "export", *options]) == 0
    page = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert f"scripts/benchmark.py export {' '.join(options)}" in page
    result = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))["results"]["clip-demo"]
    first, second = result["variants"]
    assert (first["part"], first["precision"], second["precision"]) == ("text", "fp32", "fp16")
    assert second["size_bytes"] < 0.6 * first["size_bytes"]
    assert first["points"] > 0
    assert first["not_run"] == []
    stages = {stage["name"]: stage for stage in result["stages"]}
    assert {"read", "write text", "write text fp16", "verify text fp16", "publish"} <= set(stages)
    for stage in stages:
        assert f"| {stage} |" in page


def test_what_was_not_run_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    export = importlib.import_module("benchmarks.export")
    numbers = {"max_abs": 0.5, "cosine": 0.25}
    verification = {"points": {"grid": 3}, "not_run": ["large sizes: slow"], "worst": {"y": numbers}, "passed": True}
    variant = {"precision": "fp16", "file": "onnx/a", "external_data": ["onnx/b"], "warnings": []}
    exported = {
        "stages": [{"name": "read", "seconds": 1.0, "peak_anonymous_bytes": 3 << 20}],
        "verification": [verification],
        "manifest": {
            "files": {"onnx/a": {"size_bytes": 1 << 20}, "onnx/b": {"size_bytes": 2 << 20}},
            "parts": [{"name": "vision", "variants": [{**variant, "verification": verification}]}],
        },
    }
    monkeypatch.setattr(export, "export_random", lambda *_: exported)
    *_, sizes, _, left_out = export.measure(["huge"]).tables
    assert sizes.rows == [("huge, vision, fp16", "3.0", "3", "5.0e-01", "0.250000")]
    assert left_out.rows == [("huge, vision, fp16", "large sizes: slow")]


def test_resample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    resample = importlib.import_module("benchmarks.resample")
    report = importlib.import_module("benchmarks.report")
    for name, value in {"GRIDS": ((4, 6),), "CHANNELS": 8, "PHOTOGRAPHS": ((48, 64),), "SIZES": (32,)}.items():
        monkeypatch.setattr(resample, name, value)
    measurement = resample.measure(rounds=2, threads=1)
    assert "again: `measure`" in report.write_report(measurement, tmp_path, "resample", "measure")
    data = json.loads((tmp_path / "resample.json").read_text(encoding="utf-8"))
    results = data["results"]
    assert [result["kind"] for result in results] == ["grid", "photograph", "photograph of any size"]
    assert [result["size"] for result in data["preprocessing"]] == [[48, 64]]
    assert all(difference <= 1e-5 for result in results for difference in result["max_abs_differences"].values())
    assert all(len(result["ms"]) == 3 and min(result["ms"].values()) > 0 for result in results)
