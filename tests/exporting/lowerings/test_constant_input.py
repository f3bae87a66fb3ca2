"""A weight that the module resamples to a fixed size costs nothing at run time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.exporting.backends import Exporter, Lowerings, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import Part
from vlm_export.graph.core.skeleton import SKELETON_THRESHOLD_BYTES
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.specs.signature import Axis, Signature, TensorSpec

Array = npt.NDArray[Any]
BACK_ENDS: tuple[tuple[Exporter, int], ...] = (("torchscript", 14), ("torchscript", 18), ("dynamo", 18))
# Below and above the size at which the simplifier does not see a weight.
CHANNELS = (3, 768)


class Resampled(nn.Module):
    """x: float32 (B, C, 24, 24), to which a table of 14 × 14 is added."""

    def __init__(self, channels: int, antialias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.table = nn.Parameter(torch.randn(1, channels, 14, 14, generator=generator))
        self.antialias = antialias
        self.shape: tuple[int, ...] = (channels, 24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.resample()

    def resample(self) -> Tensor:
        return F.interpolate(self.table, size=(24, 24), mode="bicubic", antialias=self.antialias, align_corners=False)


class PositionEmbedding(Resampled):
    """As a ViT has it: x: float32 (B, 1 + 24 · 24, C), a class token first, whose position is not resampled."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, antialias=True)
        self.first = nn.Parameter(torch.ones(1, 1, channels))
        self.shape = (1 + 24 * 24, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([self.first, self.resample().flatten(2).transpose(1, 2)], dim=1)


def part_of(module: Resampled) -> Part:
    shape: tuple[int | str, ...] = ("batch", *module.shape)
    signature = Signature((TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),), (Axis("batch"),))

    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        return {"x": np.zeros((sizes["batch"], *module.shape), np.float32)}

    return Part("vision", module.eval(), signature, examples)


def check_free(part: Part, exporter: Exporter, opset: int, folder: Path, lowerings: Lowerings | None = None) -> None:
    """Nothing but the addition is left, simplified or not, and its result is torch's."""
    raw = export_part(part, opset, exporter, lowerings or Lowerings())
    x = np.random.default_rng(0).standard_normal(part.examples({"batch": 3}, 0)["x"].shape).astype(np.float32)
    with torch.no_grad():
        expected = part.module(torch.from_numpy(x)).numpy()
    simplified = finish_graph(simplify_graph(raw), part.signature)
    for name, graph in (("simplified", simplified), ("raw", finish_graph(raw, part.signature))):
        assert [node.op_type for node in graph.graph] == ["Add"], name
        # The table itself is gone.
        assert len(graph.graph.initializers) == 1, name
        path = folder / f"{name}.onnx"
        write_graph(graph, path)
        difference = np.abs(OrtEngine(path, threads=1).run({"x": x})["y"] - expected).max()
        assert difference <= 1e-5, f"{name}: {difference:.1e}"


def test_channels_lie_on_both_sides_of_the_threshold() -> None:
    below, above = (4 * channels * 14 * 14 for channels in CHANNELS)
    assert below <= SKELETON_THRESHOLD_BYTES < above


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("exporter", "opset"), BACK_ENDS)
def test_products(exporter: Exporter, opset: int, antialias: bool, channels: int, tmp_path: Path) -> None:
    check_free(part_of(Resampled(channels, antialias)), exporter, opset, tmp_path)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 18), ("dynamo", 18)])
def test_resize(exporter: Exporter, opset: int, tmp_path: Path) -> None:
    check_free(part_of(Resampled(CHANNELS[1], True)), exporter, opset, tmp_path, Lowerings(interpolation="resize-op"))


@pytest.mark.parametrize(("exporter", "opset"), BACK_ENDS)
def test_position_embedding(exporter: Exporter, opset: int, tmp_path: Path) -> None:
    check_free(part_of(PositionEmbedding(CHANNELS[1])), exporter, opset, tmp_path)
