"""Sizes of an interpolation, and its weights in elementary operators where sizes are known only when the graph runs.

In float32, the precision of torch's own coordinates, or in float64 for tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from vlm_export.exporting.lowerings.resample_weights import CUBIC, CUBIC_ANTIALIAS, FUSED_BILINEAR_LIMIT, Filter

# A size is a number, or, where it depends on an input's size, what the back end has for it: torch.SymInt, or a tensor.
Size: TypeAlias = "int | torch.SymInt | Tensor"
_TABLED_SIZES = 8192
# float32 has 24 bits: a factor split with this one leaves two halves whose products with small numbers are exact.
_SPLIT = float(2**12 + 1)


@dataclass(frozen=True)
class Target:
    """What is asked of one axis.

    Attributes:
        size: of the output.
        factor: scale factor that the size comes from, None when the size was given.
        explicit: coordinates use the factor, not the ratio of the sizes.
    """

    size: Size
    factor: float | None = None
    explicit: bool = False

    @property
    def scale(self) -> float | None:
        return self.factor if self.explicit else None


def counted(n: Size) -> Tensor:
    """The size as int64 (1,) of the graph: OpenVINO expands nothing to a scalar."""
    return n.to(torch.int64).reshape(1) if isinstance(n, Tensor) else torch.full((1,), n, dtype=torch.int64)


def counted_target(source: Size, target: Target) -> Tensor:
    """The output's size as int64 (1,) of the graph."""
    if target.factor is None or isinstance(target.size, Tensor):
        return counted(target.size)
    return scaled_in_graph(source, target.factor)


def scaled_in_graph(n: Size, factor: float) -> Tensor:
    """n · factor in float64, rounded down, as torch finds the output's size: int64 (1,) of the graph.

    Not every runtime has float64 (OpenVINO computes in float32), so where float32 would miss, sizes below
    `_TABLED_SIZES` are looked up.
    """
    numbers = np.arange(_TABLED_SIZES)
    exact = np.floor(numbers * factor).astype(np.int64)
    count = counted(n)
    # Of one element, not a scalar, which the TorchScript back end would take for a number and retype.
    product = (count.to(torch.float32) * torch.tensor([factor], dtype=torch.float32)).floor().to(torch.int64)
    if (np.floor(numbers.astype(np.float32) * np.float32(factor)) == exact).all():
        return product
    tabled = torch.from_numpy(exact).index_select(0, count.clamp(max=_TABLED_SIZES - 1))
    return torch.where(count < _TABLED_SIZES, tabled, product)


def smaller(a: Size, b: Size) -> Size:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return torch.sym_min(a, b)


@dataclass(frozen=True)
class Axis:
    """One axis: how much of it there is, and what is asked of it.

    Attributes:
        count, wanted: source and target size, float (1,).
        step: source samples for one target sample, float (1,).
        fused: bool (1,), see `FUSED_BILINEAR_LIMIT`.
    """

    source: Size
    target: Target
    form: Filter
    count: Tensor
    wanted: Tensor
    step: Tensor
    fused: Tensor


def matrices_in_graph(
    sources: Sequence[Size], targets: tuple[Target, Target], form: Filter, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`resample_matrix` of both axes in elementary operators."""
    rows, columns = describe_axes(sources, targets, form, dtype)
    return build_matrix(rows), build_matrix(columns)


def describe_axes(
    sources: Sequence[Size], targets: tuple[Target, Target], form: Filter, dtype: torch.dtype
) -> tuple[Axis, Axis]:
    counts = [counted(n).to(dtype) for n in sources]
    wanted = [counted_target(n, target).to(dtype) for n, target in zip(sources, targets, strict=True)]
    steps = [_step_in_graph(counts[i], wanted[i], targets[i].scale, form) for i in range(2)]
    fused = wanted[0] + wanted[1] <= FUSED_BILINEAR_LIMIT
    rows, columns = (Axis(sources[i], targets[i], form, counts[i], wanted[i], steps[i], fused) for i in range(2))
    return rows, columns


def build_matrix(axis: Axis) -> Tensor:
    sources, targets = indices(axis.source, axis.count.dtype), target_indices(axis)
    if axis.form.antialias:
        return antialiasing_weights(sources, find_centres(axis, targets).unsqueeze(1), axis)
    taps = find_taps(axis, targets)
    terms = [weight.unsqueeze(1) * (place.unsqueeze(1) == sources).to(weight.dtype) for place, weight in taps]
    return sum(terms[1:], terms[0])


def antialiasing_weights(sources: Tensor, centres: Tensor, axis: Axis) -> Tensor:
    """Weights (…, targets, samples) of sources (…, 1, samples) for targets (…, targets, 1)."""
    middles, stretch = sources + 0.5, axis.step.clamp(min=1.0)
    distances = (middles - centres).abs() / stretch
    if axis.form.mode == "bilinear":
        # Zero where torch's window ends, but for roundings of the ends that are worth 5e-6.
        window = (middles > centres - stretch) & (middles <= centres + stretch)
        weights = (1.0 - distances).clamp(min=0.0) * window.to(distances.dtype)
    else:
        # Zero where torch's window ends, with zero slope: no sample needs a mask.
        near, far = _near(distances, CUBIC_ANTIALIAS), _far(distances.clamp(max=2.0), CUBIC_ANTIALIAS)
        weights = torch.where(distances < 1, near, far)
    return weights / weights.sum(dim=-1, keepdim=True)


def find_taps(axis: Axis, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The source samples that count for each target, as float indices (n,), and their weights (n,)."""
    position, last = _positions(axis, targets), axis.count - 1
    first = torch.minimum(position.floor(), last)
    part = (position - first).clamp(0.0, 1.0)
    if axis.form.mode == "bilinear":
        weights = [(0, 1 - part), (1, part)]
    else:
        weights = [(-1, _far(1 + part, CUBIC)), (0, _near(part, CUBIC))]
        weights += [(1, _near(1 - part, CUBIC)), (2, _far(2 - part, CUBIC))]
    return [(torch.minimum((first + offset).clamp(min=0.0), last), weight) for offset, weight in weights]


def indices(n: Size, dtype: torch.dtype) -> Tensor:
    return torch.arange(cast(int, n)).to(dtype)


def target_indices(axis: Axis) -> Tensor:
    """float (n,)"""
    size, dtype = axis.target.size, axis.count.dtype
    if not is_found_by_dynamo(axis.target):
        return indices(size, dtype)
    # The size would be computed in float32, and might miss by one.
    limits = torch.tensor(0), axis.wanted.to(torch.int64).squeeze(0), torch.tensor(1)
    return torch.onnx.ops.symbolic("Range", limits, dtype=torch.int64, shape=(cast(int, size),), version=11).to(dtype)


def is_found_by_dynamo(target: Target) -> bool:
    """A size from a factor, which the dynamo back end computes in float32: it may miss by one."""
    return isinstance(target.size, torch.SymInt) and target.factor is not None


def find_centres(axis: Axis, targets: Tensor) -> Tensor:
    """Places of the targets with antialiasing."""
    return torch.add(*_product(axis.step, targets + 0.5))


def _positions(axis: Axis, targets: Tensor) -> Tensor:
    """Places of the targets without antialiasing."""
    if axis.form.align_corners:
        return torch.add(*_product(axis.step, targets))
    high, low = _product(axis.step, targets + 0.5)
    position = (high - 0.5) + low
    if axis.form.mode == "bicubic":
        return position
    return torch.where(axis.fused, position, (high + low) - 0.5).clamp(min=0.0)


def _step_in_graph(count: Tensor, wanted: Tensor, scale: float | None, form: Filter) -> Tensor:
    if form.align_corners:
        # A single target takes the first sample: (count - 1) · 0.
        several = (wanted > 1).to(count.dtype)
        return _quotient((count - 1) * several, wanted - several)
    if scale is None:
        return _quotient(count, wanted)
    step = torch.tensor([1.0 / scale], dtype=count.dtype)
    if form.mode == "bicubic" and not form.antialias:
        return step
    # torch copies an axis that keeps its size, whatever the scale factor was.
    return torch.where(count == wanted, torch.ones_like(step), step)


def _product(step: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Dekker's product: two parts that are exact for places below 2048; their sum is step · places, rounded once.

    A runtime that fuses a product and a sum rounds them once where torch rounds twice; it cannot change this.
    """
    spread = step * _SPLIT
    high = spread - (spread - step)
    return high * places, (step - high) * places


def _quotient(count: Tensor, wanted: Tensor) -> Tensor:
    """count / wanted rounded correctly, also by a runtime that multiplies by 1 / wanted instead (OpenVINO)."""
    quotient = count / wanted
    high, low = _product(quotient, wanted)
    return quotient + ((count - high) - low) / wanted


def _near(d: Tensor, a: float) -> Tensor:
    """Keys' cubic at distances up to 1."""
    return ((a + 2) * d - (a + 3)) * d * d + 1


def _far(d: Tensor, a: float) -> Tensor:
    """Keys' cubic at distances from 1 to 2."""
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
