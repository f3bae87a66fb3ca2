"""The matrices of interpolation against torch's operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from vlm_export.exporting.lowerings.resample_weights import (
    CUBIC_ANTIALIAS,
    FUSED_BILINEAR_LIMIT,
    SUPPORT,
    Coordinates,
    Filter,
    cubic_filter,
    resample_matrix,
    split_into_blocks,
)

CASES = 2000
Array = npt.NDArray[Any]


def columns_of_torch(x: Array, target: int, form: Filter, scale: float | None) -> Array:
    width = x.shape[1]
    to: dict[str, Any] = {"size": (target, width)} if scale is None else {"scale_factor": (scale, 1.0)}
    options: dict[str, Any] = {"mode": form.mode, "antialias": form.antialias, "align_corners": form.align_corners}
    y = F.interpolate(torch.from_numpy(x)[None, None], **to, **options)
    assert y.shape[2:] == (target, width)
    return y[0, 0].double().numpy()


def test_equal_to_torchs_operator(filters: tuple[Filter, ...], draw_case: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    compared = 0
    while compared < CASES:
        form = filters[compared % len(filters)]
        case = draw_case(rng)
        source, target, scale = case.shape[2], case.size[0], None
        if rng.random() < 0.3:
            scale = round(float(rng.uniform(0.1, 2.5)), 2)
            target = int(source * scale)
            if not 1 <= target <= 400:
                continue
        options: dict[str, Any] = {
            "mode": form.mode,
            "antialias": form.antialias,
            "align_corners": form.align_corners,
            "scale": scale,
        }
        fused = form.mode == "bicubic" or target + 4 <= FUSED_BILINEAR_LIMIT
        x = rng.uniform(-1, 1, (source, 4))
        precisions: tuple[tuple[Coordinates, float], ...] = (("float32", 3e-6), ("float64", 1e-12))
        for dtype, tolerance in precisions:
            values = x.astype(dtype)
            matrix = resample_matrix(source, target, **options, coordinates=dtype, fused=fused)
            expected = columns_of_torch(values, target, form, scale)
            difference = np.abs(matrix @ values - expected).max()
            assert difference <= tolerance, f"{difference:.1e}: {source} to {target}, {options}, {dtype}"
        compared += 1


@pytest.mark.parametrize(("source", "target"), [(40, 13), (9, 9), (13, 40), (400, 1)])
def test_rows_add_up_to_one(filters: tuple[Filter, ...], source: int, target: int) -> None:
    for form in filters:
        matrix = resample_matrix(
            source, target, mode=form.mode, antialias=form.antialias, align_corners=form.align_corners
        )
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


def test_the_antialiasing_filter_is_zero_outside_its_support() -> None:
    """So that no sample beyond torch's window of indices needs a mask: its weight is zero there anyway."""
    beyond = np.linspace(SUPPORT["bicubic"], 50, 1000)
    assert (cubic_filter(beyond, CUBIC_ANTIALIAS) == 0).all()
    assert abs(cubic_filter(np.array([1.999]), CUBIC_ANTIALIAS)[0]) < 1e-6
    for source, target in ((400, 37), (37, 400), (97, 96)):
        step = source / target
        centres = step * (np.arange(target) + 0.5)
        reach = SUPPORT["bicubic"] * max(step, 1.0)
        window = np.abs(np.arange(source) + 0.5 - centres[:, None]) < reach
        matrix = resample_matrix(source, target, mode="bicubic", antialias=True, coordinates="float64")
        assert not matrix[~window].any()


def test_dropped_antialiasing_and_the_other_coefficient_are_other_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    right = resample_matrix(50, 20, mode="bicubic", antialias=True)
    assert np.abs(right - resample_matrix(50, 20, mode="bicubic", antialias=False)).max() > 1e-2
    monkeypatch.setattr("vlm_export.exporting.lowerings.resample_weights.CUBIC_ANTIALIAS", -0.75)
    assert np.abs(right - resample_matrix(50, 20, mode="bicubic", antialias=True)).max() > 1e-3


@pytest.mark.parametrize(("source", "target", "rows"), [(400, 64, 8), (397, 50, 8), (30, 64, 16), (64, 8, 8)])
def test_blocks_are_the_matrix(source: int, target: int, rows: int) -> None:
    matrix = resample_matrix(source, target, mode="bicubic", antialias=True)
    blocks = split_into_blocks(matrix, rows)
    assert blocks.columns.min() >= 0
    assert blocks.columns.max() < source
    rebuilt = np.zeros((blocks.weights.shape[0] * rows, source))
    for i, (columns, weights) in enumerate(zip(blocks.columns, blocks.weights, strict=True)):
        rebuilt[i * rows : (i + 1) * rows, columns] = weights
    np.testing.assert_array_equal(rebuilt[:target], matrix)
    assert not rebuilt[target:].any()
