"""Interpolation as two matrix products, for every opset from 11 on and every runtime.

Where sizes are numbers, the matrices are constants; otherwise the graph builds them from the height and width that it
meets, with elementary operators and in float32, the precision of torch's own coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm_export.export.lowerings.resample_weights import (
    CUBIC,
    CUBIC_ANTIALIAS,
    FUSED_BILINEAR_LIMIT,
    Filter,
    resample_matrix,
    split_into_blocks,
)

# A size is a number, or, where it depends on an input's size, what the back end has for it: torch.SymInt, or a tensor.
Size: TypeAlias = "int | torch.SymInt | Tensor"
# float32 has 24 bits: a factor split with this one leaves two halves whose products with small numbers are exact.
_SPLIT = float(2**12 + 1)
# What copying an element costs, in multiply-adds; and the rows from which on a product is fast.
_COPY_COST, _LEAST_ROWS = 40, 8
_TABLED_SIZES = 8192


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


def interpolate_by_matmul(x: Tensor, sources: Sequence[Size], targets: tuple[Target, Target], form: Filter) -> Tensor:
    """rows · x · columnsᵀ for x: float (B, C, H, W); equal to torch's `interpolate`.

    Args:
        sources: H and W as numbers where they are known, although a trace may hold them as tensors.
    """
    sizes = [target.size for target in targets]
    if not all(isinstance(n, int) for n in (*sources, *sizes)):
        left, right = matrices_in_graph(sources, targets, form, x.dtype)
        return left @ x @ right.transpose(0, 1)
    rows, columns = (int(n) for n in sizes)
    down, across = (
        resample_matrix(
            source,
            size,
            mode=form.mode,
            antialias=form.antialias,
            align_corners=form.align_corners,
            scale=target.scale,
            coordinates="float64" if x.dtype == torch.float64 else "float32",
            fused=form.mode == "bicubic" or rows + columns <= FUSED_BILINEAR_LIMIT,
        )
        for source, size, target in zip(map(int, sources), (rows, columns), targets, strict=True)
    )
    return _multiply_constants(x, down, across)


def _multiply_constants(x: Tensor, down: npt.NDArray[np.float64], across: npt.NDArray[np.float64]) -> Tensor:
    (rows, height), (columns, width) = down.shape, across.shape
    rows_first = _row_cost(down) * width + _column_cost(across) * rows
    columns_first = _column_cost(across) * height + _row_cost(down) * columns
    if rows_first <= columns_first:
        return _multiply_columns(_multiply_rows(x, down), across)
    return _multiply_rows(_multiply_columns(x, across), down)


def _row_cost(matrix: npt.NDArray[np.float64]) -> int:
    """For one column of x."""
    return 0 if _is_identity(matrix) else _best_rows(matrix)[1]


def _column_cost(matrix: npt.NDArray[np.float64]) -> int:
    """For one row of x; blocks need it transposed."""
    rows, cost = _best_rows(matrix)
    if _is_identity(matrix):
        return 0
    return cost if rows == len(matrix) else cost + _COPY_COST * sum(matrix.shape)


def _is_identity(matrix: npt.NDArray[np.float64]) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == np.eye(len(matrix))).all())


def _best_rows(matrix: npt.NDArray[np.float64]) -> tuple[int, int]:
    """Rows of one block, and the cost for one column of x; all rows: the matrix as it is."""
    target, source = matrix.shape
    best = target, target * source
    for rows in range(_LEAST_ROWS, target // 2 + 1):
        if target % rows == 0:
            blocks = split_into_blocks(matrix, rows)
            best = min(best, (rows, blocks.columns.size * (rows + _COPY_COST)), key=lambda pair: pair[1])
    return best


def _multiply_rows(x: Tensor, matrix: npt.NDArray[np.float64]) -> Tensor:
    """matrix · x; a banded matrix in blocks, each of which meets the rows of x that it needs."""
    if _is_identity(matrix):
        return x
    target, rows = len(matrix), _best_rows(matrix)[0]
    if rows == target:
        return torch.from_numpy(matrix).to(x.dtype) @ x
    blocks = split_into_blocks(matrix, rows)
    channels, width = int(x.shape[1]), int(x.shape[3])
    taken = x.index_select(2, torch.from_numpy(blocks.columns.ravel()))
    windows = taken.reshape(-1, channels, *blocks.columns.shape, width)
    product = torch.from_numpy(blocks.weights).to(x.dtype) @ windows
    return product.reshape(-1, channels, target, width)


def _multiply_columns(x: Tensor, matrix: npt.NDArray[np.float64]) -> Tensor:
    if _is_identity(matrix):
        return x
    if _best_rows(matrix)[0] == len(matrix):
        return x @ torch.from_numpy(matrix.T.copy()).to(x.dtype)
    return _multiply_rows(x.transpose(2, 3), matrix).transpose(2, 3)


@dataclass(frozen=True)
class _Samples:
    """An axis of unknown size: its indices, float (n,), and their number, float (1,)."""

    index: Tensor
    count: Tensor


def matrices_in_graph(
    sources: Sequence[Size], targets: tuple[Target, Target], form: Filter, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`resample_matrix` of both axes in elementary operators, of sizes that are known when the graph runs."""
    height, width = (_counted_samples(n, dtype) for n in sources)
    rows, columns = (_target_samples(n, target, dtype) for n, target in zip(sources, targets, strict=True))
    fused = rows.count + columns.count <= FUSED_BILINEAR_LIMIT
    down = _matrix_in_graph(height, rows, targets[0].scale, form, fused)
    across = _matrix_in_graph(width, columns, targets[1].scale, form, fused)
    return down, across


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


def _counted_samples(n: Size, dtype: torch.dtype) -> _Samples:
    return _Samples(torch.arange(cast(int, n)).to(dtype), counted(n).to(dtype))


def _target_samples(source: Size, target: Target, dtype: torch.dtype) -> _Samples:
    if target.factor is None or not isinstance(target.size, torch.SymInt):
        return _counted_samples(target.size, dtype)
    # The dynamo back end would compute the size from the factor in float32, and might miss by one.
    count = scaled_in_graph(source, target.factor)
    limits = torch.tensor(0), count.squeeze(0), torch.tensor(1)
    index = torch.onnx.ops.symbolic("Range", limits, dtype=torch.int64, shape=(target.size,), version=11)
    return _Samples(index.to(dtype), count.to(dtype))


def _matrix_in_graph(source: _Samples, target: _Samples, scale: float | None, form: Filter, fused: Tensor) -> Tensor:
    step = _step_in_graph(source.count, target.count, scale, form)
    if form.antialias:
        return _antialiased_in_graph(source.index, torch.add(*_product(step, target.index + 0.5)), step, form)
    if form.align_corners:
        position = torch.add(*_product(step, target.index))
    else:
        high, low = _product(step, target.index + 0.5)
        position = (high - 0.5) + low
        if form.mode == "bilinear":
            position = torch.where(fused, position, (high + low) - 0.5)
    return _sampled_in_graph(source, position, form)


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


def _antialiased_in_graph(sources: Tensor, centres: Tensor, step: Tensor, form: Filter) -> Tensor:
    middles, stretch, centres = sources + 0.5, step.clamp(min=1.0), centres.unsqueeze(1)
    distances = (middles - centres).abs() / stretch
    if form.mode == "bilinear":
        # Zero where torch's window ends, but for roundings of the ends that are worth 5e-6.
        window = (middles > centres - stretch) & (middles <= centres + stretch)
        weights = (1.0 - distances).clamp(min=0.0) * window.to(distances.dtype)
    else:
        # Zero where torch's window ends, with zero slope: no sample needs a mask.
        near, far = _near(distances, CUBIC_ANTIALIAS), _far(distances.clamp(max=2.0), CUBIC_ANTIALIAS)
        weights = torch.where(distances < 1, near, far)
    return weights / weights.sum(dim=1, keepdim=True)


def _near(d: Tensor, a: float) -> Tensor:
    """Keys' cubic at distances up to 1."""
    return ((a + 2) * d - (a + 3)) * d * d + 1


def _far(d: Tensor, a: float) -> Tensor:
    """Keys' cubic at distances from 1 to 2."""
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def _sampled_in_graph(source: _Samples, position: Tensor, form: Filter) -> Tensor:
    last = source.count - 1
    if form.mode == "bilinear":
        position = position.clamp(min=0.0)
    first = torch.minimum(position.floor(), last)
    part = (position - first).clamp(0.0, 1.0)
    if form.mode == "bilinear":
        taps = [(0, 1 - part), (1, part)]
    else:
        taps = [(-1, _far(1 + part, CUBIC)), (0, _near(part, CUBIC))]
        taps += [(1, _near(1 - part, CUBIC)), (2, _far(2 - part, CUBIC))]
    terms = []
    for offset, weight in taps:
        column = torch.minimum((first + offset).clamp(min=0.0), last)
        hit = (column.unsqueeze(1) == source.index).to(weight.dtype)
        terms.append(weight.unsqueeze(1) * hit)
    return sum(terms[1:], terms[0])
