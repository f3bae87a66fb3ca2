"""The matrices of separable interpolation, as PyTorch computes them: y = rows · x · columnsᵀ.

Facts: pytorch/pytorch, aten/src/ATen/native/UpSample.h and cpu/UpSampleKernel.cpp, valid for 2.1 to 2.15; the tests
compare with the installed one. The centre of target sample i lies at scale · (i + ½) in the source, where a sample j
reaches from j to j + 1. Without antialiasing, the two or four nearest samples are weighted; indices past the edge are
clamped to it. With it, the filter is stretched by the scale when that is above 1, cut at the edges and normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Mode: TypeAlias = Literal["bilinear", "bicubic"]
Coordinates: TypeAlias = Literal["float32", "float64"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Keys' cubic: torch takes OpenCV's coefficient without antialiasing and Pillow's with it.
CUBIC, CUBIC_ANTIALIAS = -0.75, -0.5
# Half the filter's width, in samples of the coarser grid.
SUPPORT: dict[Mode, int] = {"bilinear": 1, "bicubic": 2}
# Where output height + width do not exceed this, torch's CPU kernel for bilinear is another one, whose compiler fuses
# the product and the subtraction of a coordinate; the kernel for bicubic always does.
FUSED_BILINEAR_LIMIT = 128
Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Filter:
    """What torch's `interpolate` is asked for, besides sizes."""

    mode: Mode
    antialias: bool = False
    align_corners: bool = False


def resample_matrix(
    source: int,
    target: int,
    *,
    mode: Mode,
    antialias: bool,
    align_corners: bool = False,
    scale: float | None = None,
    coordinates: Coordinates = "float32",
    fused: bool = True,
) -> npt.NDArray[np.float64]:
    """float64 (target, source): row i holds the weights of the source samples in target sample i.

    Args:
        scale: explicit scale factor, which replaces target / source; None when torch derives it from the sizes.
        coordinates: precision in which torch computes them: that of its input. They decide more than the weights'
            own precision: a float32 coordinate near 400 is rounded by up to 1.5e-5.
        fused: coordinates without antialiasing are rounded once, as by a fused multiply-add; see
            `FUSED_BILINEAR_LIMIT`.
    """
    keeps = mode == "bilinear" or antialias
    if keeps and source == target:
        return np.eye(source)
    dtype = np.dtype(coordinates).type
    step = _step(source, target, align_corners, scale, dtype)
    if antialias:
        return _antialiased(source, target, step, mode, dtype)
    return _sampled(source, _positions(target, step, align_corners, dtype, fused), mode)


def _step(source: int, target: int, align_corners: bool, scale: float | None, dtype: Any) -> Any:
    """Source samples for one target sample."""
    if align_corners:
        return dtype(source - 1) / dtype(target - 1) if target > 1 else dtype(0)
    return dtype(source) / dtype(target) if scale is None else dtype(1.0 / scale)


def _antialiased(source: int, target: int, step: Any, mode: Mode, dtype: Any) -> npt.NDArray[np.float64]:
    # The centre formula knows nothing of align_corners: so it is in torch.
    centres = (np.float64(step) * (np.arange(target) + 0.5)).astype(dtype)
    stretch, middles = max(float(step), 1.0), np.arange(source) + 0.5
    distances = np.abs(middles - centres.astype(np.float64)[:, None]) / stretch
    weights = np.maximum(1.0 - distances, 0.0) if mode == "bilinear" else cubic_filter(distances, CUBIC_ANTIALIAS)
    reach = dtype(SUPPORT[mode] * stretch)
    # Beyond its reach the filter is zero, but for these roundings: torch drops weights of up to 5e-6.
    weights *= (middles > (centres - reach)[:, None]) & (middles <= (centres + reach)[:, None])
    normalised: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def cubic_filter(distances: Array, coefficient: float) -> Array:
    """Keys' piecewise cubic at distances ≥ 0; zero from 2 on."""
    a, d = coefficient, np.minimum(distances, 2.0)
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d < 1, near, far)


def _positions(target: int, step: Any, align_corners: bool, dtype: Any, fused: bool) -> Array:
    index = np.arange(target, dtype=dtype)
    if align_corners:
        return np.asarray(step * index)
    half = dtype(0.5)
    if fused and dtype is np.float32:
        return np.asarray((np.float64(step) * (index + half) - 0.5).astype(dtype))
    return np.asarray(step * (index + half) - half)


def _sampled(source: int, positions: Array, mode: Mode) -> npt.NDArray[np.float64]:
    positions = positions.astype(np.float64)
    if mode == "bilinear":
        positions = np.maximum(positions, 0.0)
    first = np.minimum(np.floor(positions), source - 1).astype(np.int64)
    part = np.clip(positions - first, 0.0, 1.0)
    rows = np.arange(len(positions))
    matrix = np.zeros((len(positions), source))
    for offset in range(1 - SUPPORT[mode], SUPPORT[mode] + 1):
        distance = np.abs(offset - part)
        weight = 1.0 - distance if mode == "bilinear" else cubic_filter(distance, CUBIC)
        np.add.at(matrix, (rows, np.clip(first + offset, 0, source - 1)), weight)
    return matrix


@dataclass(frozen=True)
class Blocks:
    """A banded matrix in groups of rows that read a window of columns each.

    Attributes:
        columns: int64 (groups, window), the columns that a group reads.
        weights: float64 (groups, rows, window); rows beyond the matrix are zero.
    """

    columns: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


def split_into_blocks(matrix: npt.NDArray[np.float64], rows: int) -> Blocks:
    """The matrix (target, source) in groups of `rows` rows; each window is as wide as the widest of them needs."""
    target, source = matrix.shape
    groups = -(-target // rows)
    padded = np.zeros((groups * rows, source))
    padded[:target] = matrix
    used = (padded.reshape(groups, rows, source) != 0).any(axis=1)
    first, last = used.argmax(axis=1), source - used[:, ::-1].argmax(axis=1)
    window = int((last - first).max())
    columns = np.minimum(first, source - window)[:, None] + np.arange(window)
    weights = np.take_along_axis(padded.reshape(groups, rows, source), columns[:, None, :], axis=2)
    return Blocks(columns, weights)
