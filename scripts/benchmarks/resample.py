"""Interpolation in ONNX Runtime against torch eager, and preprocessing in the graph against Pillow on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.measuring import interleaved
from benchmarks.report import Bars, Report, Table, table
from vlm_export.exporting.backends import Lowerings, export_part
from vlm_export.exporting.finishing import write_graph
from vlm_export.exporting.lowerings.resample import Interpolation
from vlm_export.family import Part
from vlm_export.lab.timing import median_ratio
from vlm_export.models.layers.from_uint8 import PreprocessedVision
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import torchvision_image_spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec

# Positions per side, from and to; as many channels as ViT-B.
GRIDS = ((16, 24), (24, 16), (37, 24), (14, 70), (70, 32))
CHANNELS = 768
PHOTOGRAPHS = ((480, 640), (864, 1152), (1536, 2048), (3000, 4000))
SIZES = (224, 336, 448)
GOALS: dict[str, dict[str, float]] = {
    "grid": {"matmul": 1.0},
    "photograph": {"resize-op": 1.0, "matmul": 2.5},
    "photograph of any size": {"resize-op": 1.0, "matmul": 2.5},
}
FORMS: tuple[Interpolation, ...] = ("resize-op", "matmul")
_OPSET = 18
_CLIP = torchvision_image_spec(
    224, "bicubic", "after_crop", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


class _Resample(nn.Module):
    """To a fixed size, or to that of the second input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        size = (self.size, self.size) if like is None else like.shape[2:]
        return F.interpolate(x, size=size, mode="bicubic", antialias=True)


def measure(rounds: int, threads: int) -> Report:
    """Bicubic with antialiasing: torch and both forms in turn, `rounds` times for each size; then Pillow's and ours."""
    torch.set_num_threads(threads)
    sizes = [("grid", (CHANNELS, source, source), target) for source, target in GRIDS]
    photographs = [((3, *photograph), size) for photograph in PHOTOGRAPHS for size in SIZES]
    sizes += [(kind, *pair) for kind in ("photograph", "photograph of any size") for pair in photographs]
    results = [_measure_size(kind, shape, target, rounds, threads) for kind, shape, target in sizes]
    pipelines = _measure_preprocessing(rounds, threads)
    worst = {
        (kind, form): max(result["ratios"][form] for result in results if result["kind"] == kind)
        for kind, goals in GOALS.items()
        for form in goals
    }
    parts = [f"{form} {times:.2f} times torch ({kind})" for (kind, form), times in worst.items()]
    slowest = max(result["ratio"] for result in pipelines)
    return Report(
        title="Bicubic interpolation with antialiasing",
        goal="against torch eager, matmul takes at most its time on position grids; on photographs, whether the graph "
        "knows their size or not, resize-op takes at most its time and matmul at most "
        f"{GOALS['photograph']['matmul']:g} times.",
        reached=all(times <= GOALS[kind][form] for (kind, form), times in worst.items()),
        conclusion=f"at most {', '.join(parts)}; preprocessing in the graph {slowest:.2f} times Pillow.",
        tables=(_table(results, rounds, threads), _preprocessing_table(pipelines)),
        bars=Bars(
            "Time against torch eager",
            "times",
            [(f"{_label(result)}, {form}", result["ratios"][form]) for result in results for form in FORMS],
        ),
        data={"rounds": rounds, "threads": threads, "goals": GOALS, "results": results, "preprocessing": pipelines},
    )


def _measure_size(kind: str, shape: tuple[int, ...], target: int, rounds: int, threads: int) -> dict[str, Any]:
    module = _Resample(target).eval()
    feeds = {"x": torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).numpy()}
    if kind == "photograph of any size":
        feeds["like"] = np.zeros((1, 1, target, target), np.float32)
    tensors = [torch.from_numpy(value) for value in feeds.values()]
    with TemporaryDirectory() as folder, torch.inference_mode():
        engines = {form: _engine(module, shape, target, form, "like" in feeds, Path(folder), threads) for form in FORMS}
        runs: dict[str, Callable[[], Any]] = {"torch": lambda: module(*tensors)}
        runs |= {form: partial(_y, engine, feeds) for form, engine in engines.items()}
        expected = module(*tensors).numpy()
        differences = {form: float(np.abs(runs[form]() - expected).max()) for form in FORMS}
        times = interleaved(runs, rounds, f"{kind} {shape} to {target}")
    ratios = {form: median_ratio(times[form], times["torch"]) for form in FORMS}
    return {
        "kind": kind,
        "shape": shape,
        "target": target,
        "ms": {name: 1e3 * median(values) for name, values in times.items()},
        "ratios": ratios,
        "max_abs_differences": differences,
    }


def _engine(
    module: nn.Module,
    shape: tuple[int, ...],
    target: int,
    form: Interpolation,
    any_size: bool,
    folder: Path,
    threads: int,
) -> OrtEngine:
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "float32", ("batch", *shape)),)
    output = TensorSpec("y", "float32", ("batch", shape[0], target, target))
    names = ["batch"]
    if any_size:
        names += ["height", "width", "rows", "columns"]
        like = TensorSpec("like", "float32", ("batch", 1, "rows", "columns"))
        inputs = (TensorSpec("x", "float32", ("batch", shape[0], "height", "width")), like)
        output = TensorSpec("y", "float32", ("batch", shape[0], "rows", "columns"))
    return _export(
        module, Signature(inputs, (output,), tuple(map(Axis, names))), form, folder / f"{form}.onnx", threads
    )


def _export(module: nn.Module, signature: Signature, form: Interpolation, path: Path, threads: int) -> OrtEngine:
    def zeros(sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
        return {spec.name: np.zeros(spec.concrete_shape(sizes), spec.dtype) for spec in signature.inputs}

    part = Part("vision", module, signature, zeros)
    write_graph(export_part(part, _OPSET, "torchscript", Lowerings(form)), path)
    return OrtEngine(path, threads=threads)


def _measure_preprocessing(rounds: int, threads: int) -> list[dict[str, Any]]:
    """A decoded image to normalised pixels, the preprocessing of CLIP, on the host with Pillow and in a graph."""
    module = PreprocessedVision(_CLIP, nn.Identity()).eval()
    pixels = TensorSpec("pixels", "uint8", ("batch", "height", "width", 3))
    values = TensorSpec("pixel_values", "float32", ("batch", 3, _CLIP.size_pixels, _CLIP.size_pixels))
    signature = Signature((pixels,), (values,), (Axis("batch"), Axis("height"), Axis("width")))
    results = []
    with TemporaryDirectory() as folder, torch.inference_mode():
        engine = _export(module, signature, "matmul", Path(folder) / "graph.onnx", threads)
        for height, width in PHOTOGRAPHS:
            image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
            runs: dict[str, Callable[[], Any]] = {
                "Pillow": partial(preprocess_image, Image.fromarray(image[0]), _CLIP),
                "graph": partial(engine.run, {"pixels": image}),
            }
            times = interleaved(runs, rounds, f"preprocessing of {height}×{width}")
            ms = {name: 1e3 * median(seconds) for name, seconds in times.items()}
            results.append({"size": (height, width), "ms": ms, "ratio": median_ratio(times["graph"], times["Pillow"])})
    return results


def _y(engine: OrtEngine, feeds: Mapping[str, Any]) -> Any:
    return engine.run(feeds)["y"]


def _table(results: list[dict[str, Any]], rounds: int, threads: int) -> Table:
    columns = {"image": "{label}", "torch, ms": "{ms[torch]:.2f}"}
    for form in FORMS:
        columns |= {
            f"{form}, ms": f"{{ms[{form}]:.2f}}",
            f"{form}, ratio": f"{{ratios[{form}]:.2f}}",
            f"{form}, difference": f"{{max_abs_differences[{form}]:.1e}}",
        }
    title = f"{rounds} interleaved rounds, {threads} threads; medians, ratio: median of the pairs', difference: max-abs"
    return table(f"{title}, of noise in 0 to 1", columns, [{**result, "label": _label(result)} for result in results])


def _preprocessing_table(results: list[dict[str, Any]]) -> Table:
    columns = {
        "image": "{size[0]}×{size[1]}",
        "Pillow and numpy, ms": "{ms[Pillow]:.2f}",
        "graph, ms": "{ms[graph]:.2f}",
        "ratio": "{ratio:.2f}",
    }
    return table(f"Decoded images of any size to {_CLIP.size_pixels} normalised pixels, cropped", columns, results)


def _label(result: Mapping[str, Any]) -> str:
    channels, height, width = result["shape"]
    any_size = ", any size" if result["kind"] == "photograph of any size" else ""
    return f"{channels}×{height}×{width} to {result['target']}{any_size}"
