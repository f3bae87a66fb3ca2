"""Random cases of torch's `interpolate`, what torch computes for them, and graphs of its lowerings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.exporting.backends import Exporter, Lowerings, export_part
from vlm_export.exporting.lowerings.resample_weights import MODES, Filter
from vlm_export.family import Part
from vlm_export.specs.signature import Axis, Signature, TensorSpec

ORIGINAL = F.interpolate
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """Sizes of one call: from (B, C, H, W) to (H, W), or by factors."""

    shape: tuple[int, int, int, int]
    size: tuple[int, int]


class Interpolate(nn.Module):
    """To a size: that of the second input, a fixed one, or by factors."""

    def __init__(self, form: Filter, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "mode": form.mode,
            "antialias": form.antialias,
            "align_corners": form.align_corners,
            **options,
        }

    def forward(self, pixels: Tensor, like: Tensor | None = None) -> Tensor:
        options = self.options if like is None else {"size": like.shape[2:], **self.options}
        return F.interpolate(pixels, **options)


def by_torch(pixels: Tensor, **options: Any) -> Tensor:
    """torch's own result.

    With antialiasing and an output one pixel wide, torch 2.15 repeats the first row of its result on contiguous
    images; it is right about the same image when rows and columns change places.
    """
    y = ORIGINAL(pixels, **options)
    if not options["antialias"] or y.shape[3] > 1:
        return y
    swapped: dict[str, Any] = {
        key: value[::-1] if isinstance(value, tuple) else value for key, value in options.items()
    }
    return ORIGINAL(pixels.transpose(2, 3).contiguous(), **swapped).transpose(2, 3)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Of one thread, torch's bilinear kernel for three channels rounds coordinates unlike that of several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference() -> Callable[..., Tensor]:
    return by_torch


@pytest.fixture(scope="session")
def filters() -> tuple[Filter, ...]:
    """Both modes with all flags."""
    return tuple(Filter(*choice) for choice in itertools.product(MODES, (False, True), (False, True)))


@pytest.fixture(scope="session")
def draw_case() -> Callable[[np.random.Generator], Case]:
    """Sizes from 1 to 400: any, nearly equal, equal along an axis, single pixels."""

    def draw(rng: np.random.Generator) -> Case:
        pairs = [_pair(rng), _pair(rng)]
        (height, rows), (width, columns) = pairs
        return Case((int(rng.integers(1, 3)), int(rng.integers(1, 4)), height, width), (rows, columns))

    return draw


def _pair(rng: np.random.Generator) -> tuple[int, int]:
    source, target = (int(n) for n in rng.integers(1, 401, 2))
    kind = rng.random()
    if kind < 0.3:
        target = min(max(source + int(rng.integers(-3, 4)), 1), 400)
    elif kind < 0.4:
        source = int(rng.integers(1, 4))
    elif kind < 0.5:
        target = int(rng.integers(1, 4))
    return source, target


@pytest.fixture(scope="session")
def noise() -> Callable[[np.random.Generator, tuple[int, ...]], Array]:
    """float32 in [-1, 1], uncorrelated: neighbours differ as much as they can, the hardest case for coordinates."""
    return lambda rng, shape: rng.uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="session")
def build_part() -> Callable[..., Part]:
    """A Part that interpolates, with all sizes symbolic; `case` makes them fixed, `options` are interpolate's."""

    def build(form: Filter, channels: int = 3, case: Case | None = None, **options: Any) -> Part:
        if case is not None:
            shapes: dict[str, tuple[int | str, ...]] = {"pixels": ("batch", *case.shape[1:])}
            out: tuple[int | str, ...] = ("batch", case.shape[1], *case.size)
            options = {"size": case.size, **options}
        else:
            shapes = {"pixels": ("batch", channels, "height", "width")}
            if "scale_factor" not in options:
                shapes["like"] = ("batch", 1, "rows", "columns")
            out = ("batch", channels, "rows", "columns")
        inputs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
        names = dict.fromkeys(axis for shape in (*shapes.values(), out) for axis in shape if isinstance(axis, str))
        axes = tuple(Axis(name, 1, 4096) for name in names)
        signature = Signature(inputs, (TensorSpec("y", "float32", out),), axes)

        def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
            return {spec.name: np.zeros(spec.concrete_shape(sizes), np.float32) for spec in inputs}

        return Part("vision", Interpolate(form, **options), signature, examples)

    return build


@pytest.fixture(scope="session")
def export_graph() -> Callable[..., onnx.ModelProto]:
    """The back end's own graph of a part."""

    def export(part: Part, exporter: Exporter, opset: int, lowerings: Lowerings | None = None) -> onnx.ModelProto:
        if "rows" in {axis.name for axis in part.signature.axes} and len(part.signature.inputs) == 1:
            # Output sizes by factors are no sizes of an input.
            inputs = part.signature.inputs
            axes = tuple(axis for axis in part.signature.axes if axis.name not in ("rows", "columns"))
            y = TensorSpec("y", "float32", ("batch", inputs[0].shape[1], "height", "width"))
            part = Part(part.name, part.module, Signature(inputs, (y,), axes), part.examples)
        return ir.to_proto(export_part(part, opset, exporter, lowerings or Lowerings()))

    return export


@pytest.fixture
def save_graph(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    """The graph in a file."""

    def save(graph: onnx.ModelProto) -> Path:
        path = tmp_path / "graph.onnx"
        onnx.save(graph, path)
        return path

    return save
