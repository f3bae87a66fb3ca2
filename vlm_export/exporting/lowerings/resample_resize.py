"""Interpolation as ONNX `Resize`, for runtimes that have it at opset 18 or later."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vlm_export.exporting.lowerings.resample_graph_weights import Target, counted_target
from vlm_export.exporting.lowerings.resample_weights import CUBIC, CUBIC_ANTIALIAS, Filter

RESIZE_OPSET = 18


def resize_can_express(targets: tuple[Target, Target], form: Filter) -> bool:
    """Whether `Resize` computes what torch does.

    Antialiasing that aligns corners has other centres in torch. An explicit scale would be rounded to float32, which
    can change the output's size, and torch ignores it for an axis that keeps its size.
    """
    return not (form.antialias and form.align_corners) and not any(target.explicit for target in targets)


def resize_attributes(form: Filter) -> dict[str, Any]:
    """The attributes of `Resize` with which it is torch's `interpolate`.

    Without `exclude_outside`, an antialiasing filter would weight the edge's sample once more for each position
    beyond it; torch cuts the filter there and normalises it.
    """
    attributes: dict[str, Any] = {
        "mode": "linear" if form.mode == "bilinear" else "cubic",
        "coordinate_transformation_mode": "align_corners" if form.align_corners else "half_pixel",
        "antialias": int(form.antialias),
        "exclude_outside": int(form.antialias),
        "axes": [2, 3],
    }
    if form.mode == "bicubic":
        attributes["cubic_coeff_a"] = CUBIC_ANTIALIAS if form.antialias else CUBIC
    return attributes


def interpolate_by_resize(x: Tensor, targets: tuple[Target, Target], form: Filter) -> Tensor:
    """A `Resize` node for x: float (B, C, H, W); only within an export, since torch does not execute the node."""
    counts = [counted_target(n, target) for n, target in zip(x.shape[2:], targets, strict=True)]
    sizes, attributes = torch.cat(counts), resize_attributes(form)
    shape = [x.shape[0], x.shape[1], *(cast(int, target.size) for target in targets)]
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # public, but not listed
        traced: Tensor = _TracedResize.apply(x, sizes, attributes, [int(n) for n in shape])
        return traced
    return torch.onnx.ops.symbolic(
        "Resize", (x, None, None, sizes), attributes, dtype=x.dtype, shape=shape, version=RESIZE_OPSET
    )


class _TracedResize(torch.autograd.Function):
    """What the TorchScript back end writes as `Resize`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Tensor, attributes: dict[str, Any], shape: list[int]) -> Tensor:
        return x.new_zeros(shape)

    @staticmethod
    def symbolic(g: Any, x: Any, sizes: Any, attributes: dict[str, Any], shape: list[int]) -> Any:
        kinds = {str: "s", int: "i", float: "f", list: "i"}
        named = {f"{name}_{kinds[type(value)]}": value for name, value in attributes.items()}
        empty = g.op("prim::Constant")
        empty.setType(torch._C.OptionalType.ofTensor())
        return g.op("Resize", x, empty, empty, sizes, **named)
