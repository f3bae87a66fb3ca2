"""`bench`: every side on every load in turn, each in its own process, with its loss. Times are not judged."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.lab import bench_plan
from vlm_export.lab.bench_plan import BenchOptions, Load, Side, loads_of, sides_of
from vlm_export.lab.bench_result import BenchResult, Cost, Measured
from vlm_export.lab.plots import Mark, mark_plot
from vlm_export.lab.timing import Spread, interleaved, ratios
from vlm_export.runtime.engines.openvino import computes_in_bf16

FEW: dict[str, Any] = {"parts": ["text"], "batches": [2], "threads": [1], "rounds": 2}


def result_of(times: dict[Side, list[float]], cosines: Mapping[Side, float | None], **options: Any) -> BenchResult:
    load = Load("vision", 4, None)
    measured = tuple(Measured(side, load, tuple(seconds)) for side, seconds in times.items())
    costs = tuple(Cost(side, "vision", 1.0, 1, 1, 1, cosine) for side, cosine in cosines.items())
    return BenchResult("a bundle", ("embed",), BenchOptions(**options), measured, costs)


def test_rounds_begin_with_another_side_each() -> None:
    order: list[str] = []

    def place(name: str) -> float:
        order.append(name)
        return float(len(order))

    times = interleaved({name: partial(place, name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert times == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_ratios_are_those_of_rounds() -> None:
    assert Spread.of(ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])) == Spread(2.0, 2.0, 2.5)
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)


def test_every_side_runs_on_every_load(demo: Path) -> None:
    found = vlm_export.bench(demo, BenchOptions(**{**FEW, "batches": [2, 1], "lengths": [4, 9]}))
    assert [load.label for load in found.loads] == [
        f"text, batch {batch}, length {length}" for length in (4, 9) for batch in (1, 2)
    ]
    in_bf16 = ["openvino bf16"] if computes_in_bf16() else []
    names = [f"{engine} {precision}" for engine in ("onnxruntime", "openvino") for precision in ("fp32", "fp16")]
    for load in found.loads:
        assert [one.side.name for one in found.on(load)] == names + in_bf16
        assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in found.on(load))
        assert vars(found.speed(found.on(load)[0])) == {"median": 1.0, "low": 1.0, "high": 1.0}
    costs = {cost.side.name: cost for cost in found.costs}
    assert costs["onnxruntime fp32"].cosine == pytest.approx(1.0, abs=1e-12)
    assert 1e-9 < 1 - (costs["onnxruntime fp16"].cosine or 0) < 1e-3
    assert costs["onnxruntime fp16"].size_bytes < 0.6 * costs["onnxruntime fp32"].size_bytes  # type: ignore[operator]
    assert all(cost.load_seconds > 0 for cost in found.costs)
    assert found.not_run == ()


def test_inputs_keep_the_end_of_a_text(demo: Path) -> None:
    bundle = open_bundle(demo)
    options = BenchOptions(batches=[3], lengths=[5, 20])
    loads = loads_of(bundle, bundle.manifest.part("text"), options)
    recorded = {load.length: inputs["input_ids"] for load, inputs in loads.items()}
    assert [ids.shape for ids in recorded.values()] == [(3, 5), (3, 20)]
    assert (recorded[5][:, -1] == recorded[20][:, -1]).all()
    with pytest.raises(UsageError, match="'sequence'") as caught:
        loads_of(bundle, bundle.manifest.part("text"), BenchOptions(lengths=[33]))
    assert (caught.value.expected, caught.value.got) == ("1 to 32", "33")


def test_pytorch_comes_first_and_is_not_recommended(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BenchOptions(**FEW, engines=["onnxruntime"], precisions=["fp16"], against="clip-demo")
    names = [side.name for side in sides_of(open_bundle(demo).manifest, options)]
    assert names == ["torch eager", "torch compiled", "torch bf16", "onnxruntime fp16"]
    monkeypatch.setattr(bench_plan, "TORCH_FORMS", ("bf16",))
    found = vlm_export.bench(demo, options)
    assert [side.name for side in found.sides] == ["torch bf16", "onnxruntime fp16"], found.not_run
    assert 1e-6 < 1 - (found.costs[0].cosine or 0) < 0.01
    best = found.recommendation()
    assert best is not None
    assert best.side.engine == "onnxruntime"


@pytest.mark.slow
def test_pytorch_runs_in_each_of_its_forms(demo: Path) -> None:
    options = BenchOptions(**FEW, engines=["onnxruntime"], precisions=["fp32"], against="clip-demo")
    found = vlm_export.bench(demo, options)
    assert found.not_run == ()
    assert [cost.cosine for cost in found.costs[:2]] == pytest.approx([1.0, 1.0], abs=1e-9)


def test_a_graph_beside_the_bundle_runs_on_its_inputs(demo: Path) -> None:
    graph = demo / "onnx" / "text_model_fp16.onnx"
    found = vlm_export.bench(demo, BenchOptions(**FEW, precisions=["fp32"], engines=["onnxruntime"], graphs=[graph]))
    assert [side.name for side in found.sides] == ["onnxruntime fp32", "onnxruntime text_model_fp16"]
    assert 1e-9 < 1 - (found.costs[1].cosine or 0) < 1e-3
    best = found.recommendation()
    assert best is not None
    assert best.side.precision == "fp32"
    with pytest.raises(UsageError, match="graphs stand for one part"):
        BenchOptions(graphs=[graph])


def test_what_there_is_not_is_named(demo: Path) -> None:
    manifest = open_bundle(demo).manifest
    for options, words in (
        ({"precisions": ["int9"]}, "no variant 'int9'"),
        ({"engines": ["onnx"]}, "no engine 'onnx'"),
        ({"engines": ["onnxruntime"], "precisions": ["bf16"]}, "ONNX Runtime does not compute"),
        ({"threads": [10**6]}, "threads"),
    ):
        with pytest.raises(UsageError, match=words):
            sides_of(manifest, BenchOptions(**options))
    with pytest.raises(UsageError, match="no part 'txt'"):
        vlm_export.bench(demo, BenchOptions(parts=["txt"]))
    with pytest.raises(UsageError, match="batches are numbers from 1"):
        BenchOptions(batches=[0])


def test_a_side_that_fails_is_left_out(copied: Path, relist: Callable[[Path], None]) -> None:
    (copied / "onnx" / "text_model_fp16.onnx").write_bytes(b"no graph")
    relist(copied)
    options = BenchOptions(**FEW, engines=["onnxruntime"])
    found = vlm_export.bench(copied, options)
    assert [side.precision for side in found.sides] == ["fp32"]
    assert [text.partition(":")[0] for text in found.not_run] == ["text, onnxruntime fp16, 1 thread"]
    with pytest.raises(InputError, match="nothing could be measured"):
        vlm_export.bench(copied, BenchOptions(**{**FEW, "precisions": ["fp16"], "engines": ["onnxruntime"]}))


def test_the_fastest_within_the_bound_is_recommended() -> None:
    exact, fast, wrong = Side("onnxruntime", "fp32", 2), Side("openvino", "bf16", 2), Side("onnxruntime", "int8", 2)
    eager = Side("torch", "eager", 2)
    times = {eager: [8.0, 8.0], exact: [4.0, 5.0], fast: [2.0, 2.0], wrong: [1.0, 1.0]}
    cosines = {eager: 1.0, exact: 1.0, fast: 0.9995, wrong: 0.98}
    best = result_of(times, cosines).recommendation()
    assert best is not None
    assert best.side == fast
    assert best.speed == pytest.approx(4.0)
    assert best.call == "vlm_export.load('a bundle', engine='openvino', precision='bf16', threads=2)"
    assert shlex.split(best.command)[-6:] == ["--engine", "openvino", "--precision", "bf16", "--threads", "2"]
    stricter = result_of(times, cosines, least_cosine=0.9999).recommendation()
    assert stricter is not None
    assert stricter.call == "vlm_export.load('a bundle', precision='fp32', threads=2)"
    assert result_of(times, {**cosines, exact: None, fast: None, wrong: None}).recommendation() is None


def test_names_in_a_plot_do_not_lie_on_one_another() -> None:
    marks = [Mark(f"side {number}", 1 + number / 100, 0.01) for number in range(6)]
    plot = ElementTree.fromstring(mark_plot("a plot", [*marks, Mark("far away", 900.0, 0.01)]))
    texts = {text.text: text for text in plot.iter("{http://www.w3.org/2000/svg}text")}
    heights = sorted(float(texts[mark.label].get("y", "nan")) for mark in marks)
    assert min(b - a for a, b in pairwise(heights)) >= 11
    assert {"0", "200", "1e+03"} <= set(texts)


def test_the_command_prints_a_table_json_and_plots(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(demo), "--part", "text", "--batch", "1", "--threads", "1", "2", "--rounds", "1"]
    words += ["--engine", "onnxruntime", "--plot", str(tmp_path / "bench.svg")]
    assert main([*words, "--recommend"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("  vlm")), out
    assert "fastest with a cosine of at least 0.999 as float32: onnxruntime" in out
    plot = ElementTree.parse(tmp_path / "bench.svg").getroot()
    titles = {title.text for title in plot.iter("{http://www.w3.org/2000/svg}title")}
    assert "text, batch 1, length 32: rows per second against threads" in titles
    assert main([*words, "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {(one["precision"], one["threads"]) for one in data["measured"]} == {
        (precision, threads) for precision in ("fp32", "fp16") for threads in (1, 2)
    }
    assert data["recommended"]["call"].startswith("vlm_export.load(")
    assert np.isfinite([one["seconds"]["median"] for one in data["measured"]]).all()
