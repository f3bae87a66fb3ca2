"""torch's `interpolate` in the forms that an exporter and every runtime can take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_export.exporting.lowerings.resample_graph_weights import Size, Target, scaled_in_graph
from vlm_export.exporting.lowerings.resample_matmul import interpolate_by_matmul
from vlm_export.exporting.lowerings.resample_resize import interpolate_by_resize, resize_can_express
from vlm_export.exporting.lowerings.resample_weights import MODES, Filter

Interpolation: TypeAlias = Literal["matmul", "resize-op"]
_original = F.interpolate


@dataclass(frozen=True)
class InterpolationLowering:
    """How `interpolate` is replaced.

    Attributes:
        form: `resize-op`: ONNX `Resize` where it computes the same, otherwise two matrix products.
        static_sizes: no height or width depends on the size of an input. The TorchScript back end traces sizes as
            tensors and cannot tell by itself; where sizes are numbers already, this changes nothing.
    """

    form: Interpolation = "matmul"
    static_sizes: bool = False

    def interpolate(
        self,
        input: Tensor,  # torch's own names, for callers by keyword
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Tensor:
        """torch's `interpolate`; other modes and ranks than bilinear and bicubic of images go to the original."""
        if mode not in MODES or input.ndim != 4 or (size is None) == (scale_factor is None):
            return _original(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
        form = Filter(mode, antialias, bool(align_corners))
        sources = self._fixed(input.shape[2:])
        if size is not None:
            height, width = (Target(n) for n in self._fixed(_pair(size)))
        else:
            explicit = not recompute_scale_factor
            factors = _pair(scale_factor)
            height, width = (
                Target(_scaled(n, factor), float(factor), explicit) for n, factor in zip(sources, factors, strict=True)
            )
        targets = height, width
        if self.form == "resize-op" and resize_can_express(targets, form):
            return interpolate_by_resize(input, targets, form)
        return interpolate_by_matmul(input, sources, targets, form)

    def _fixed(self, sizes: Sequence[Size]) -> list[Size]:
        return [int(n) if self.static_sizes else n for n in sizes]


def _pair(value: Any) -> tuple[Any, Any]:
    first, second = value if isinstance(value, tuple | list | torch.Size) else (value, value)
    return first, second


def _scaled(n: Size, factor: float) -> Size:
    if isinstance(n, Tensor):
        return scaled_in_graph(n, factor).squeeze(0)
    return torch.sym_int(n * factor) if isinstance(n, torch.SymInt) else math.floor(n * factor)


@contextmanager
def lower_interpolation(lowering: InterpolationLowering) -> Iterator[None]:
    """Within the context, torch's `interpolate`, and so `nn.Upsample`, is the lowering's."""
    original = F.interpolate
    F.interpolate = lowering.interpolate
    try:
        yield
    finally:
        F.interpolate = original
