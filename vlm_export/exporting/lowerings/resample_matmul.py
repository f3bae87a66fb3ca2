"""Interpolation by matrix products, with constant matrices or in the graph, for every opset from 11 on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm_export.exporting.lowerings.resample_graph_weights import (
    Axis,
    Size,
    Target,
    antialiasing_weights,
    build_matrix,
    counted,
    describe_axes,
    find_centres,
    find_taps,
    indices,
    is_found_by_dynamo,
    smaller,
    target_indices,
)
from vlm_export.exporting.lowerings.resample_weights import (
    FUSED_BILINEAR_LIMIT,
    SUPPORT,
    Filter,
    resample_matrix,
    split_into_blocks,
)

# What copying an element costs, in multiply-adds; and the rows from which on a product is fast.
_COPY_COST, _LEAST_ROWS = 40, 8
# Rows that are computed together, from one window of the source.
_GROUP = 16
_IMAGE_CHANNELS = 4


def interpolate_by_matmul(x: Tensor, sources: Sequence[Size], targets: tuple[Target, Target], form: Filter) -> Tensor:
    """rows · x · columnsᵀ for x: float (B, C, H, W); equal to torch's `interpolate`.

    Args:
        sources: H and W as numbers where they are known, although a trace may hold them as tensors.
    """
    sizes = [target.size for target in targets]
    if not all(isinstance(n, int) for n in (*sources, *sizes)):
        return interpolate_in_graph(x, sources, targets, form)
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


def interpolate_in_graph(x: Tensor, sources: Sequence[Size], targets: tuple[Target, Target], form: Filter) -> Tensor:
    """`interpolate` of x: float (B, C, H, W), first the rows, then the columns.

    Tables of positions and features are small and have many channels: they meet whole matrices. Of images, a row
    takes the samples that count; with antialiasing these are many, and neighbours share a window of them.
    """
    rows, columns = describe_axes(sources, targets, form, x.dtype)
    # A trace has a tensor for the number of channels; it decides nothing but the form.
    is_image = not isinstance(x.shape[1], torch.SymInt) and int(x.shape[1]) <= _IMAGE_CHANNELS
    x = _resample_rows(x, rows) if is_image and _is_banded(rows) else build_matrix(rows) @ x
    if is_image and _is_banded(columns):
        return _resample_rows(x.transpose(2, 3), columns).transpose(2, 3)
    return x @ build_matrix(columns).transpose(0, 1)


def _is_banded(axis: Axis) -> bool:
    """Whether windows are as long as the ratio of the sizes says, and the graph knows that exactly."""
    return not (axis.form.antialias and (axis.form.align_corners or is_found_by_dynamo(axis.target)))


def _resample_rows(x: Tensor, axis: Axis) -> Tensor:
    if axis.form.antialias:
        return _multiply_windows(x, axis)
    taps = find_taps(axis, target_indices(axis))
    terms = [x.index_select(2, place.to(torch.int64)) * weight.unsqueeze(1) for place, weight in taps]
    return sum(terms[1:], terms[0])


def _multiply_windows(x: Tensor, axis: Axis) -> Tensor:
    """In groups of target rows, each of which meets a window of the source."""
    window, groups = window_size(axis), _groups(axis.target.size)
    targets = indices(groups, x.dtype).unsqueeze(1) * _GROUP + indices(_GROUP, x.dtype)
    centres = find_centres(axis, torch.minimum(targets, axis.wanted - 1)).unsqueeze(2)
    reach = SUPPORT[axis.form.mode] * axis.step.clamp(min=1.0)
    first = (centres[:, 0] - reach).floor() - 1
    # A window that would end outside is moved inside.
    first = torch.minimum(first.clamp(min=0.0), axis.count - counted(window).to(x.dtype))
    samples = first + indices(window, x.dtype)
    weights = antialiasing_weights(samples.unsqueeze(1), centres, axis)
    taken = x.index_select(2, samples.to(torch.int64).flatten())
    windows = taken.reshape(x.shape[0], x.shape[1], groups, window, x.shape[3])
    product = (weights @ windows).reshape(x.shape[0], x.shape[1], groups * _GROUP, x.shape[3])
    return _cut(product, axis.target.size)


def _groups(n: Any) -> Any:
    needed = (n + (_GROUP - 1)) // _GROUP
    # torch distinguishes a single group from several, and would demand the traced case: there are always two.
    return needed + 1 if isinstance(n, torch.SymInt) else needed


def window_size(axis: Axis) -> Any:
    """Source samples that `_GROUP` target samples need, at most."""
    support, scale = SUPPORT[axis.form.mode], axis.target.scale
    source, size = cast(Any, axis.source), cast(Any, axis.target.size)
    steps, rest = _GROUP - 1 + 2 * support, 2 * support + 4
    if scale is None:
        return smaller(steps * source // size + rest, source)
    return smaller(math.ceil(steps * max(1.0 / scale, 1.0)) + rest, source)


def _cut(x: Tensor, size: Size) -> Tensor:
    """The first rows."""
    if not isinstance(size, torch.SymInt):
        return x[:, :, :size]
    # torch cannot see that there are at least as many, and would make it a condition.
    inputs = x, torch.tensor([0]), counted(size), torch.tensor([2])
    return torch.onnx.ops.symbolic("Slice", inputs, dtype=x.dtype, shape=(*x.shape[:2], size, x.shape[3]), version=13)
