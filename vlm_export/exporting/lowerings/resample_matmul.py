"""Interpolation as two matrix products, for every opset from 11 on and every runtime: matrices that are constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm_export.exporting.lowerings.resample_in_graph import interpolate_in_graph
from vlm_export.exporting.lowerings.resample_sizes import Size, Target
from vlm_export.exporting.lowerings.resample_weights import (
    FUSED_BILINEAR_LIMIT,
    Filter,
    resample_matrix,
    split_into_blocks,
)

# What copying an element costs, in multiply-adds; and the rows from which on a product is fast.
_COPY_COST, _LEAST_ROWS = 40, 8


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
