"""Images whose size is known only when the graph runs: rows in windows of the source, not whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor

from vlm_export.exporting.backends import Exporter
from vlm_export.exporting.lowerings import resample_matmul
from vlm_export.exporting.lowerings.resample_graph_weights import Target
from vlm_export.exporting.lowerings.resample_matmul import interpolate_in_graph
from vlm_export.exporting.lowerings.resample_weights import Filter
from vlm_export.family import Part
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.engines.openvino import OpenVinoEngine

# Groups that are full, cut, and single; windows that the source's ends stop; strong and no reduction.
SIZES = ((1, 1), (1, 400), (16, 3), (17, 400), (33, 1000), (48, 49), (100, 40), (300, 7), (64, 2000), (20, 3000))
ANTIALIASED = (Filter("bicubic", antialias=True), Filter("bilinear", antialias=True))


def options_of(form: Filter) -> dict[str, Any]:
    return {"mode": form.mode, "antialias": form.antialias, "align_corners": form.align_corners}


@pytest.fixture
def no_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(axis: object) -> Tensor:
        raise AssertionError("a whole matrix")

    monkeypatch.setattr(resample_matmul, "build_matrix", refuse)


def in_graph(x: Tensor, size: tuple[int, int], form: Filter, scales: tuple[float, float] | None = None) -> Tensor:
    """As the TorchScript back end traces it: sizes are tensors."""
    rows, columns = (
        Target(torch.tensor(n)) if scales is None else Target(torch.tensor(n), scales[i], explicit=True)
        for i, n in enumerate(size)
    )
    return interpolate_in_graph(x, [torch.tensor(n) for n in x.shape[2:]], (rows, columns), form)


@pytest.mark.usefixtures("no_matrices")
def test_equal_to_torch(
    filters: tuple[Filter, ...], noise: Callable[..., npt.NDArray[Any]], reference: Callable[..., Tensor]
) -> None:
    rng = np.random.default_rng(0)
    for form in filters:
        if form.antialias and form.align_corners:
            continue
        for target, source in SIZES:
            for shape, size in (((1, 3, source, 9), (target, 5)), ((2, 1, 9, source), (5, target))):
                x = torch.from_numpy(noise(rng, shape))
                expected = reference(x, size=size, **options_of(form))
                # Beyond 400 samples a coordinate's own rounding is what differs.
                limit = 1e-5 * max(1, source / 400)
                assert float((in_graph(x, size, form) - expected).abs().max()) <= limit, f"{form} {shape} {size}"


@pytest.mark.usefixtures("no_matrices")
@pytest.mark.parametrize("factor", [0.05, 0.31, 1.0, 1.02, 2.7])
def test_scale_factors(
    factor: float,
    filters: tuple[Filter, ...],
    noise: Callable[..., npt.NDArray[Any]],
    reference: Callable[..., Tensor],
) -> None:
    for form in filters:
        if form.antialias and form.align_corners:
            continue
        x = torch.from_numpy(noise(np.random.default_rng(1), (1, 3, 201, 45)))
        size = int(201 * factor), int(45 * factor)
        expected = reference(x, scale_factor=factor, **options_of(form))
        got = in_graph(x, size, form, (factor, factor))
        assert float((got - expected).abs().max()) <= 1e-5, f"{form}"


@pytest.mark.parametrize("form", ANTIALIASED, ids=lambda form: form.mode)
def test_windows_that_are_too_short_would_show(
    form: Filter, monkeypatch: pytest.MonkeyPatch, reference: Callable[..., Tensor]
) -> None:
    x = torch.rand(1, 3, 500, 20) + 1
    expected = reference(x, size=(64, 20), **options_of(form))
    full = resample_matmul.window_size
    assert float((in_graph(x, (64, 20), form) - expected).abs().max()) <= 2e-5
    monkeypatch.setattr(resample_matmul, "window_size", lambda axis: full(axis) - 12)
    # Or NaN, where no sample is left.
    assert not float((in_graph(x, (64, 20), form) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 11), ("dynamo", 18)])
@pytest.mark.parametrize("channels", [3, 5])
def test_photographs_in_the_engines(
    exporter: Exporter,
    opset: int,
    channels: int,
    build_part: Callable[..., Part],
    export_graph: Callable[..., onnx.ModelProto],
    save_graph: Callable[[onnx.ModelProto], Path],
    noise: Callable[..., npt.NDArray[Any]],
    reference: Callable[..., Tensor],
) -> None:
    """Of three channels in windows, of more by whole matrices."""
    rng = np.random.default_rng(2)
    form = ANTIALIASED[0]
    path = save_graph(export_graph(build_part(form, channels=channels), exporter, opset))
    engines: tuple[OrtEngine | OpenVinoEngine, ...] = OrtEngine(path, threads=1), OpenVinoEngine(path, threads=1)
    for shape, size in (((1, channels, 600, 800), (64, 47)), ((3, channels, 1, 90), (16, 300))):
        x = noise(rng, shape)
        expected = reference(torch.from_numpy(x), size=size, **options_of(form)).numpy()
        for engine in engines:
            got = engine.run({"pixels": x, "like": np.zeros((shape[0], 1, *size), np.float32)})["y"]
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5, err_msg=type(engine).__name__)
