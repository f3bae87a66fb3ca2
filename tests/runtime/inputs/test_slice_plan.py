"""Slices, their order and their placeholders are the recorded decisions; odd sizes give defined results or errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_export.errors import InputError
from vlm_export.models.minicpmv.slicing import slice_spec_from_version
from vlm_export.runtime.inputs.slice_placeholder import placeholder_parts, placeholder_text
from vlm_export.runtime.inputs.slice_plan import SlicePlan, plan_slices
from vlm_export.specs.slices import SliceSpec

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "data" / "minicpmv" / "preprocess" / "slicing_geometry.json").read_text("utf-8")
)
# 4.0 and 4.5 slice and write as 2.6 does.
RECORDS = [
    pytest.param(version, record, id=f"{version}-{record['wh'][0]}x{record['wh'][1]}")
    for version, of in {"2.0": "2.0", "2.5": "2.5", "2.6": "2.6", "4.0": "2.6", "4.5": "2.6"}.items()
    for record in RECORDED[of]
]


def spec_of(version: str = "2.6", size_pixels: int = 448, max_slices: int = 9) -> SliceSpec:
    return slice_spec_from_version(version, queries=3, size_pixels=size_pixels, max_slices=max_slices)


def plan_of(width: int, height: int, spec: SliceSpec | None = None) -> SlicePlan:
    return plan_slices((width, height), spec or spec_of())


@pytest.mark.parametrize(("version", "record"), RECORDS)
def test_decisions_are_the_recorded_ones(version: str, record: dict[str, Any]) -> None:
    width, height = record["wh"]
    plan = plan_of(width, height, spec_of(version))
    assert list(plan.source_size) == record["source_wh"]
    assert len(plan.sizes) == record["n_slices"]
    grid = plan.grid
    assert (None if grid is None else [grid.columns, grid.rows]) == record["grid_cols_rows"]
    assert (None if grid is None else list(grid.slice_size)) == record["patch_wh"]


@pytest.mark.parametrize(("version", "record"), RECORDS)
def test_placeholders_are_the_recorded_ones(version: str, record: dict[str, Any]) -> None:
    spec = spec_of(version)
    width, height = record["wh"]
    parts = placeholder_parts(plan_of(width, height, spec), spec.placeholder)
    assert placeholder_text(parts, spec.placeholder, queries="{Q}") == record["placeholder_compact"]
    assert [part for part in parts if isinstance(part, int)] == list(range(record["n_slices"]))
    expected = record["placeholder_compact"].replace("{Q}", "<unk><unk><unk>")
    assert placeholder_text(parts, spec.placeholder) == expected


def test_the_records_tell_the_versions_and_axes_apart() -> None:
    assert len({records[2]["placeholder_compact"] for records in RECORDED.values()}) == 3
    assert any(len(set(record["grid_cols_rows"] or [0])) == 2 for record in RECORDED["2.6"])


def test_parts_alternate_text_and_slices() -> None:
    spec = spec_of("2.6")
    parts = placeholder_parts(plan_of(480, 640, spec), spec.placeholder, image_index=7)
    assert parts == (
        "<image_id>7</image_id><image>",
        0,
        "</image><slice>",
        1,
        "</slice>\n<slice>",
        2,
        "</slice>",
    )


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.0", "<image><unk><unk><unk></image>\n"),
        ("omnilmm", "<im_start><im_patch><im_patch><im_patch><im_end>\n"),
    ],
)
def test_square_versions_have_one_place(version: str, expected: str) -> None:
    spec = spec_of(version)
    parts = placeholder_parts(plan_of(900, 300, spec), spec.placeholder)
    assert placeholder_text(parts, spec.placeholder) == expected


@given(
    width=st.integers(1, 12_000),
    height=st.integers(1, 12_000),
    size_pixels=st.sampled_from([56, 448]),
    max_slices=st.integers(1, 12),
)
@example(width=12_000, height=1, size_pixels=448, max_slices=9)
@settings(max_examples=300, deadline=None)
def test_every_plan_covers_the_image_within_its_bounds(
    width: int, height: int, size_pixels: int, max_slices: int
) -> None:
    spec = spec_of("2.6", size_pixels, max_slices)
    plan = plan_slices((width, height), spec, max_patches=1 << 30)
    area = size_pixels * size_pixels
    assert all(edge % 14 == 0 and edge > 0 for size in plan.sizes for edge in size)
    assert len(plan.sizes) <= max_slices + 1
    assert (plan.grid is None) == (width * height <= area or max_slices == 1)
    assert [(rows * 14, columns * 14) for rows, columns in plan.patch_grids] == [(h, w) for w, h in plan.sizes]
    # Where rounding to whole patches is a small change, every slice has about a square's area.
    assert all(w * h <= 1.7 * area for w, h in plan.sizes if min(w, h) >= 28)
    if plan.grid is None or plan.refined_size is None:
        assert plan.boxes == ()
        return
    assert 2 <= plan.grid.columns * plan.grid.rows == len(plan.boxes) == len(plan.sizes) - 1
    covered = np.zeros((plan.refined_size[1] // 14, plan.refined_size[0] // 14), dtype=np.int64)
    for (left, top, right, bottom), size in zip(plan.boxes, plan.sizes[1:], strict=True):
        assert (right - left, bottom - top) == size
        covered[top // 14 : bottom // 14, left // 14 : right // 14] += 1
    assert (covered == 1).all()
    assert list(plan.boxes) == sorted(plan.boxes, key=lambda box: (box[1], box[0]))


@given(width=st.integers(20, 4000), height=st.integers(20, 4000))
@settings(max_examples=100, deadline=None)
def test_the_chosen_grid_is_nearest_to_the_aspect(width: int, height: int) -> None:
    grid = plan_of(width, height).grid
    if grid is None:
        return
    wanted = min(math.ceil(width * height / 448**2), 9)
    counts = {wanted - 1, wanted, wanted + 1} & set(range(2, 10))
    errors = {
        (columns, rows): abs(math.log(width / height) - math.log(columns / rows))
        for columns in range(1, 10)
        for rows in range(1, 10)
        if columns * rows in counts
    }
    assert errors[grid.columns, grid.rows] == min(errors.values())


@pytest.mark.parametrize(("size_pixels", "edge"), [(35, 28), (49, 56), (63, 56), (77, 84)])
def test_halves_of_a_patch_round_to_even(size_pixels: int, edge: int) -> None:
    assert plan_of(50, 50, spec_of("2.6", size_pixels, 1)).source_size == (edge, edge)


@pytest.mark.parametrize(
    ("size", "slice_size"),
    [((300, 767), (476, 420)), ((300, 872), (448, 448)), ((1399, 711), (504, 392)), ((1399, 851), (462, 434))],
)
def test_sides_are_made_divisible_by_the_grid_before_slices_are_sized(
    size: tuple[int, int], slice_size: tuple[int, int]
) -> None:
    """Sizes at which the originals' step changes the slice."""
    grid = plan_of(*size).grid
    assert grid is not None
    assert grid.slice_size == slice_size


@pytest.mark.parametrize(
    ("size", "source"),
    [
        ((1, 1), (448, 448)),
        # The long side is rounded down twice when it is the width, once when it is the height.
        ((1, 10_000), (14, 44_800)),
        ((10_000, 1), (39_998, 14)),
        # The original's height falls below one pixel here, and takes the width with it.
        ((10_000_000, 1), (14, 14)),
    ],
)
def test_thin_images_are_as_in_the_original(size: tuple[int, int], source: tuple[int, int]) -> None:
    assert plan_of(*size).source_size == source


@pytest.mark.parametrize("size", [(1, 20_000), (200_704, 1), (400_000, 1)])
def test_slices_that_would_be_too_long_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="too long and thin") as caught:
        plan_slices(size, spec_of(), name="strip.png")
    assert caught.value.where == "strip.png"
    assert "4,096 patches" in caught.value.expected
    assert f"{size[0]} x {size[1]}" in caught.value.got


def test_the_bound_of_patches_is_an_argument() -> None:
    assert plan_slices((1, 20_000), spec_of(), max_patches=4525).source_size == (14, 63_350)
    with pytest.raises(InputError, match="too long and thin"):
        plan_slices((1, 20_000), spec_of(), max_patches=4524)


@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_images_without_pixels_are_refused(version: str) -> None:
    with pytest.raises(InputError, match="no pixels"):
        plan_of(0, 10, spec_of(version))


def test_a_plan_prints_as_json() -> None:
    assert json.loads(json.dumps(plan_of(640, 480).to_json())) == {
        "size": [640, 480],
        "grid": {"columns": 2, "rows": 1},
        "slices": [
            {"size": [518, 392], "patches": [28, 37]},
            {"size": [364, 546], "patches": [39, 26]},
            {"size": [364, 546], "patches": [39, 26]},
        ],
    }
