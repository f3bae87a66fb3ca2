"""`interpolate` replaced: equal to torch where it is replaced, untouched elsewhere, and undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.exporting.lowerings import resample_graph_weights
from vlm_export.exporting.lowerings.resample import InterpolationLowering, lower_interpolation
from vlm_export.exporting.lowerings.resample_graph_weights import Target, matrices_in_graph
from vlm_export.exporting.lowerings.resample_matmul import interpolate_by_matmul
from vlm_export.exporting.lowerings.resample_weights import Filter

ORIGINAL = F.interpolate
# Ten for each filter.
CASES = 80


def options_of(form: Filter) -> dict[str, Any]:
    return {"mode": form.mode, "antialias": form.antialias, "align_corners": form.align_corners}


def limit(x: Tensor) -> float:
    return 1e-5 * float(x.abs().max())


def test_equal_to_torch(
    filters: tuple[Filter, ...],
    draw_case: Callable[..., Any],
    noise: Callable[..., Any],
    reference: Callable[..., Tensor],
) -> None:
    """Constant matrices, and those that graphs of unknown sizes build, on the same images."""
    rng = np.random.default_rng(1)
    for i in range(CASES):
        form, case = filters[i % len(filters)], draw_case(rng)
        x = torch.from_numpy(noise(rng, case.shape))
        expected = reference(x, size=case.size, **options_of(form))
        with lower_interpolation(InterpolationLowering()):
            constant = F.interpolate(x, size=case.size, **options_of(form))
        sizes = Target(case.size[0]), Target(case.size[1])
        down, across = matrices_in_graph(case.shape[2:], sizes, form, torch.float32)
        largest = limit(x)
        for name, got in (("constant", constant), ("built", down @ x @ across.T)):
            difference = float((got - expected).abs().max())
            assert difference <= largest, f"{name} {case} {form}: {difference:.1e}"


def test_scale_factors(
    filters: tuple[Filter, ...], noise: Callable[..., Any], reference: Callable[..., Tensor]
) -> None:
    rng = np.random.default_rng(2)
    # 1.02 keeps 17 rows, which torch then copies; 0.7 and 1.3 are rounded in float32.
    for factors in (2, 0.5, (0.7, 1.3), (1.02, 3.3)):
        for form in filters:
            for recompute in (None, True):
                x = torch.from_numpy(noise(rng, (2, 3, 17, 30)))
                how = {"scale_factor": factors, "recompute_scale_factor": recompute, **options_of(form)}
                with lower_interpolation(InterpolationLowering()):
                    got = F.interpolate(x, **how)
                assert float((got - reference(x, **how)).abs().max()) <= limit(x), f"{how}"


@pytest.mark.parametrize(
    ("height", "width", "size"), [(700, 500, (96, 80)), (90, 1200, (60, 128)), (64, 64, (64, 200))]
)
def test_banded_matrices_in_blocks(height: int, width: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, height, width)
    for mode in ("bilinear", "bicubic"):
        form = Filter(mode, antialias=True)
        got = interpolate_by_matmul(x, (height, width), (Target(size[0]), Target(size[1])), form)
        torch.testing.assert_close(got, ORIGINAL(x, size=size, mode=mode, antialias=True), atol=1e-5, rtol=0)


def test_double_precision() -> None:
    x = torch.rand(1, 2, 40, 30, dtype=torch.float64)
    with lower_interpolation(InterpolationLowering()):
        got = F.interpolate(x, size=(13, 57), mode="bicubic", antialias=True)
    expected = ORIGINAL(x, size=(13, 57), mode="bicubic", antialias=True)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_upsample_modules_are_replaced() -> None:
    x = torch.rand(1, 2, 9, 7)
    module = nn.Upsample(scale_factor=2.5, mode="bicubic")
    expected = module(x)
    with lower_interpolation(InterpolationLowering()):
        assert F.interpolate is not ORIGINAL
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((1, 2, 8, 6), {"size": (5, 5)}),
        ((1, 2, 8, 6), {"size": (5, 5), "mode": "area"}),
        ((1, 2, 8), {"size": 5, "mode": "linear"}),
        ((1, 2, 8, 6, 4), {"scale_factor": 2, "mode": "trilinear"}),
    ],
)
def test_what_is_not_lowered_is_torchs(shape: tuple[int, ...], how: dict[str, Any]) -> None:
    x = torch.rand(shape)
    with lower_interpolation(InterpolationLowering("resize-op")):
        assert torch.equal(F.interpolate(x, **how), ORIGINAL(x, **how))


def test_misuse_is_refused_as_by_torch() -> None:
    x = torch.rand(1, 2, 8, 6)
    with lower_interpolation(InterpolationLowering()), pytest.raises(ValueError, match="either size or scale_factor"):
        F.interpolate(x, mode="bicubic")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_undone_by_an_exception(error: type[BaseException]) -> None:
    with pytest.raises(error), lower_interpolation(InterpolationLowering()):
        raise error
    assert F.interpolate is ORIGINAL


def test_wrong_coefficients_exceed_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(np.random.default_rng(3).uniform(-1, 1, (1, 3, 60, 50)).astype(np.float32))
    sizes = Target(24), Target(80)
    for antialias, name in ((True, "CUBIC_ANTIALIAS"), (False, "CUBIC")):
        form = Filter("bicubic", antialias)
        expected = ORIGINAL(x, size=(24, 80), mode="bicubic", antialias=antialias)
        down, across = matrices_in_graph((60, 50), sizes, form, torch.float32)
        assert float((down @ x @ across.T - expected).abs().max()) <= limit(x)
        with monkeypatch.context() as patch:
            patch.setattr(resample_graph_weights, name, -0.625)
            down, across = matrices_in_graph((60, 50), sizes, form, torch.float32)
        assert float((down @ x @ across.T - expected).abs().max()) > 100 * limit(x)
