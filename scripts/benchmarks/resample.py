"""Interpolation in ONNX Runtime against torch eager: position grids and photographs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import Bars, Report, Table
from vlm_export.export.backends import Lowerings, export_part
from vlm_export.export.lowerings.resample import Interpolation
from vlm_export.export.writer import write_graph
from vlm_export.family import Part
from vlm_export.runtime.engine import OrtEngine
from vlm_export.signature import Axis, Signature, TensorSpec

# Positions per side, from and to; as many channels as ViT-B.
GRIDS = ((16, 24), (24, 16), (37, 24), (14, 70), (70, 32))
CHANNELS = 768
PHOTOGRAPHS = ((480, 640), (864, 1152), (1536, 2048), (3000, 4000))
SIZES = (224, 336, 448)
GOALS: dict[str, dict[str, float]] = {"grid": {"matmul": 1.0}, "photograph": {"resize-op": 1.0, "matmul": 2.5}}
FORMS: tuple[Interpolation, ...] = ("resize-op", "matmul")
_OPSET = 18


class _Resample(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)


def measure(rounds: int, threads: int) -> Report:
    """Bicubic with antialiasing, fixed sizes: torch and both forms in turn, `rounds` times for each size."""
    torch.set_num_threads(threads)
    sizes = [("grid", (CHANNELS, source, source), target) for source, target in GRIDS]
    sizes += [("photograph", (3, *photograph), size) for photograph in PHOTOGRAPHS for size in SIZES]
    results = [_measure_size(kind, shape, target, rounds, threads) for kind, shape, target in sizes]
    worst = {
        (kind, form): max(result["ratios"][form] for result in results if result["kind"] == kind)
        for kind, goals in GOALS.items()
        for form in goals
    }
    parts = [f"{form} {ratio:.2f} times torch on {kind}s" for (kind, form), ratio in worst.items()]
    return Report(
        name="resample",
        title="Bicubic interpolation with antialiasing",
        goal="against torch eager, matmul takes at most its time on position grids; on photographs, resize-op takes at "
        f"most its time and matmul at most {GOALS['photograph']['matmul']:g} times.",
        reached=all(ratio <= GOALS[kind][form] for (kind, form), ratio in worst.items()),
        conclusion="at most " + ", ".join(parts) + ".",
        command=f"python scripts/benchmark.py resample --rounds {rounds} --threads {threads}",
        tables=(_table(results, rounds, threads),),
        bars=Bars("Time against torch eager", "times", _bars(results)),
        data={"rounds": rounds, "threads": threads, "goals": GOALS, "results": results},
    )


def _measure_size(kind: str, shape: tuple[int, ...], target: int, rounds: int, threads: int) -> dict[str, Any]:
    print(f"{kind} {shape} to {target}: {rounds} rounds", file=sys.stderr)
    module = _Resample(target).eval()
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as folder, torch.inference_mode():
        engines = {form: _engine(module, shape, target, form, Path(folder), threads) for form in FORMS}
        runs: dict[str, Callable[[], Any]] = {"torch": lambda: module(x)}
        runs |= {form: _run_of(engine, x.numpy()) for form, engine in engines.items()}
        expected = module(x).numpy()
        differences = {form: float(np.abs(runs[form]() - expected).max()) for form in FORMS}
        times = _times(runs, rounds)
    ratios = {form: median(a / b for a, b in zip(times[form], times["torch"], strict=True)) for form in FORMS}
    return {
        "kind": kind,
        "shape": shape,
        "target": target,
        "ms": {name: 1e3 * median(values) for name, values in times.items()},
        "ratios": ratios,
        "max_abs_differences": differences,
    }


def _engine(
    module: nn.Module, shape: tuple[int, ...], target: int, form: Interpolation, folder: Path, threads: int
) -> OrtEngine:
    inputs = (TensorSpec("x", "float32", ("batch", *shape)),)
    outputs = (TensorSpec("y", "float32", ("batch", shape[0], target, target)),)
    part = Part(
        "vision",
        module,
        Signature(inputs, outputs, (Axis("batch"),)),
        lambda sizes, seed: {"x": np.zeros((sizes["batch"], *shape), np.float32)},
    )
    path = folder / f"{form}.onnx"
    write_graph(export_part(part, _OPSET, "torchscript", Lowerings(form)), path)
    return OrtEngine(path, threads=threads)


def _run_of(engine: OrtEngine, x: Any) -> Callable[[], Any]:
    return lambda: engine.run({"x": x})["y"]


def _times(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            # The first round warms up.
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def _table(results: list[dict[str, Any]], rounds: int, threads: int) -> Table:
    header = ("picture", "torch, ms", *(f"{form}, {what}" for form in FORMS for what in ("ms", "ratio", "difference")))
    rows = []
    for result in results:
        cells = [f"{_label(result)}", f"{result['ms']['torch']:.2f}"]
        for form in FORMS:
            cells += [
                f"{result['ms'][form]:.2f}",
                f"{result['ratios'][form]:.2f}",
                f"{result['max_abs_differences'][form]:.1e}",
            ]
        rows.append(cells)
    title = f"{rounds} interleaved rounds, {threads} threads; medians, ratio: median of the pairs', difference: max-abs"
    return Table(f"{title}, of noise in 0 to 1", header, rows)


def _label(result: Mapping[str, Any]) -> str:
    channels, height, width = result["shape"]
    return f"{channels}×{height}×{width} to {result['target']}"


def _bars(results: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(f"{_label(result)}, {form}", result["ratios"][form]) for result in results for form in FORMS]
