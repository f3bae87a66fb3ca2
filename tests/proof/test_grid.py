from __future__ import annotations

import inspect
from itertools import product
from typing import get_args

import pytest

from vlm_export.proof.grid import (
    BATCHES,
    RUNTIME_BATCHES,
    SEEDS,
    Attention,
    GridPoint,
    axis_sizes,
    batches_left_out,
    grid_for,
    least_grid,
    left_out,
    point_bytes,
    runtime_points,
)
from vlm_export.runtime.bulk.embed import BATCH_SIZES
from vlm_export.runtime.model import Task
from vlm_export.runtime.tasks import chat as vision_chat
from vlm_export.runtime.tasks import embed as pair
from vlm_export.runtime.tasks import features as slice_features
from vlm_export.runtime.tasks import prepared_images
from vlm_export.specs.signature import Axis, Signature, TensorSpec

# Every part has an output; of which size, does not matter here.
OUTPUT = (TensorSpec("y", "float32", (1,)),)
SEQUENCE = Axis("sequence", 1, 77)


def signature(*axes: Axis) -> Signature:
    return Signature((TensorSpec("x", "float32", tuple(axis.name for axis in axes)),), OUTPUT, axes)


BATCH_ONLY = signature(Axis("batch"))
TEXT = signature(Axis("batch"), SEQUENCE)
IMAGE = signature(Axis("batch"), Axis("height", 28, 448), Axis("width", 28, 448))


@pytest.mark.parametrize("case", [BATCH_ONLY, TEXT, IMAGE], ids=["batch", "text", "image"])
def test_every_size_and_every_seed_appears(case: Signature) -> None:
    grid = grid_for(case)
    for axis in case.axes:
        assert {point.sizes[axis.name] for point in grid} == set(axis_sizes(axis))
    assert {point.seed for point in grid} == set(SEEDS)
    assert len(grid) <= 20
    assert grid == grid_for(case)


def test_the_batches_are_those_of_the_design() -> None:
    assert {point.rows for point in grid_for(BATCH_ONLY)} == set(BATCHES) == {1, 2, 3, 5}


def test_both_ends_of_every_pair_of_axes_meet() -> None:
    found = {(point.sizes["batch"], point.sizes["sequence"]) for point in grid_for(TEXT)}
    assert set(product((1, 5), (1, 77))) <= found


def test_an_axis_is_tried_at_its_ends_and_at_odd_sizes() -> None:
    assert axis_sizes(SEQUENCE) == (1, 3, 39, 77)
    assert axis_sizes(Axis("sequence", 4, 4)) == (4,)
    assert axis_sizes(Axis("sequence", 1, 2)) == (1, 2)
    assert axis_sizes(Axis("batch", 1, 3)) == (1, 2, 3)
    assert axis_sizes(Axis("batch", 8, 8)) == (8,)
    unbounded = axis_sizes(Axis("sequence"))
    assert all(size % 2 for size in unbounded[1:-1])
    assert len(unbounded) == 4


@pytest.mark.parametrize("case", [BATCH_ONLY, TEXT], ids=["batch", "text"])
def test_a_budget_bounds_the_rows_but_not_the_coverage(case: Signature) -> None:
    costs = [sum(point.rows for point in grid_for(case, budget_rows=budget)) for budget in (1, 8, 12, 100)]
    assert costs == sorted(costs)
    assert costs[1] <= 8
    assert costs[0] < costs[3]
    smallest = grid_for(case, budget_rows=1)
    assert {point.rows for point in smallest} == {1, 2}
    for axis in case.axes[1:]:
        assert {point.sizes[axis.name] for point in smallest} == set(axis_sizes(axis))


def test_a_static_signature_is_tried_with_every_seed() -> None:
    fixed = Signature((TensorSpec("x", "float32", (1, 3)),), OUTPUT, ())
    assert [(dict(point.sizes), point.seed) for point in grid_for(fixed)] == [({}, seed) for seed in SEEDS]


def test_sums_follow_their_terms_and_stay_in_their_range() -> None:
    total = Axis("total", 1, 64, sum_of=("past", "sequence"))
    case = signature(Axis("batch"), Axis("sequence", 1, 64), Axis("past", 0, 64), total)
    grid = grid_for(case)
    for point in grid:
        assert point.sizes["total"] == point.sizes["past"] + point.sizes["sequence"] <= 64
    assert {point.sizes["sequence"] for point in grid} >= {1, 64}
    assert {0, 63} <= {point.sizes["past"] for point in grid}


def test_a_bounded_axis_stays_within_the_other() -> None:
    kept = Axis("kept", 1, 64, at_most="sequence")
    case = signature(Axis("batch"), Axis("sequence", 1, 64), kept)
    grid = grid_for(case)
    assert all(1 <= point.sizes["kept"] <= point.sizes["sequence"] for point in grid)
    assert any(point.sizes["kept"] == point.sizes["sequence"] > 1 for point in grid)
    assert any(1 == point.sizes["kept"] < point.sizes["sequence"] for point in grid)
    # Its ends with those of every other axis would double the grid of a decoder.
    assert len(grid) <= len(grid_for(signature(Axis("batch"), Axis("sequence", 1, 64)))) + 2
    assert all(point.sizes["kept"] <= point.sizes["sequence"] for point in least_grid(case))
    budget = 2000
    assert all(point_bytes(case, point.sizes) <= budget for point in grid_for(case, budget_bytes=budget))
    assert Signature.related(case, {"batch": 1, "sequence": 3, "kept": 9})["kept"] == 3


def test_a_budget_of_bytes_cuts_the_longest_axis_first() -> None:
    total = Axis("total", 1, 8192, sum_of=("past", "sequence"))
    logits = TensorSpec("logits", "float32", ("batch", "sequence", 50_000))
    cache = TensorSpec("cache", "float32", ("batch", "total", 10_000))
    axes = (Axis("batch"), Axis("sequence", 1, 8192), Axis("past", 0, 8192), total)
    case = Signature((cache,), (logits,), axes)
    budget = 64 << 20
    grid = grid_for(case, budget_bytes=budget)
    for point in grid:
        assert point_bytes(case, point.sizes) <= budget
        assert point.sizes["total"] == point.sizes["past"] + point.sizes["sequence"]
    assert {point.rows for point in grid} == set(BATCHES)
    # Half of what fits, at least: long prompts and long caches are still there.
    assert max(point.sizes["sequence"] for point in grid) > 128
    assert max(point.sizes["past"] for point in grid) > 512
    assert {0, 1} & {point.sizes["past"] for point in grid}
    assert grid_for(case, budget_bytes=1 << 40) == grid_for(case)


def test_a_budget_bounds_the_scores_of_cached_attention() -> None:
    """A long context of small tokens: the arrays are small, but not what stands between them."""
    total = Axis("total", 1, 1 << 20, sum_of=("past", "sequence"))
    embeds = TensorSpec("embeds", "float32", ("batch", "sequence", 8))
    cache = TensorSpec("cache", "float32", ("batch", "total", 8))
    case = Signature(
        (embeds,), (cache,), (Axis("batch"), Axis("sequence", 1, 1 << 20), Axis("past", 0, 1 << 20), total)
    )
    grid = grid_for(case, budget_bytes=256 << 20)
    assert max(point.rows * point.sizes["sequence"] * point.sizes["total"] for point in grid) <= 1 << 24
    assert {point.rows for point in grid} == set(BATCHES)
    assert max(point.sizes["sequence"] for point in grid) >= 1024
    assert max(point.sizes["past"] for point in grid) > 8192
    assert max(point.sizes["sequence"] for point in grid_for(case)) == 1 << 20


def test_a_budget_of_bytes_keeps_steps_and_ends_where_nothing_fits() -> None:
    steps = Signature(
        (TensorSpec("x", "float32", ("batch", "width")),), OUTPUT, (Axis("batch"), Axis("width", 14, 1400, 14))
    )
    assert all(point.sizes["width"] % 14 == 0 for point in grid_for(steps, budget_bytes=4000))
    assert {(point.rows, point.sizes["width"]) for point in grid_for(steps, budget_bytes=1)} == {(1, 14)}


SIDE = Axis("side", 14, 672, 14)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (BATCH_ONLY, [(1,), (2,)]),
        (signature(Axis("batch"), SIDE), [(1, 14), (2, 350), (1, 672)]),
        (IMAGE, [(1, 28, 239), (2, 448, 28), (1, 239, 448)]),
        (signature(Axis("batch", 1, 1), SIDE), [(1, 14), (1, 350), (1, 672)]),
        (signature(SIDE), [(14,), (350,), (672,)]),
        (signature(), [()]),
    ],
)
def test_the_least_grid_moves_every_axis(case: Signature, expected: list[tuple[int, ...]]) -> None:
    grid = least_grid(case)
    assert [tuple(point.sizes[axis.name] for axis in case.axes) for point in grid] == expected
    assert {point.seed for point in grid} == {SEEDS[0]}


def test_the_least_grid_keeps_sums() -> None:
    total = Axis("total", 1, 64, sum_of=("past", "sequence"))
    for point in least_grid(signature(Axis("batch"), Axis("sequence", 1, 64), Axis("past", 0, 64), total)):
        assert point.sizes["total"] == point.sizes["past"] + point.sizes["sequence"] <= 64


def test_what_a_grid_leaves_out_is_named() -> None:
    case = signature(Axis("batch"), SIDE)
    assert left_out(case, grid_for(case)) == ""
    whole, least = len(grid_for(case)), len(least_grid(case))
    assert left_out(case, least_grid(case)) == (
        f"{whole - least} of {whole} grid points (batch 3, 5; side 42; seed 1, 2)"
    )
    without_pairs = grid_for(case, budget_rows=12)
    assert len(without_pairs) < whole
    assert "combinations of sizes" in left_out(case, without_pairs)


def test_points_that_were_made_smaller_count_as_left_out() -> None:
    case = signature(Axis("batch"), SIDE)
    whole = grid_for(case)
    smaller = tuple(GridPoint({**point.sizes, "side": 14}, point.seed) for point in whole)
    changed = sum(point.sizes["side"] != 14 for point in whole)
    assert left_out(case, smaller) == f"{changed} of {len(whole)} grid points (side 42, 350, 672)"


def test_the_batches_of_the_runtime_are_all_tried() -> None:
    stated = {pair.IMAGE_BATCH_SIZE, pair.TEXT_BATCH_SIZE, *BATCH_SIZES.values(), vision_chat.CHAT_BATCH_SIZE}
    stated |= {prepared_images.TILE_BATCH_SIZE, slice_features.SLICE_BATCH_SIZE}
    for task in get_args(Task):
        for name, method in inspect.getmembers(task, inspect.isfunction):
            size = inspect.signature(method).parameters.get("batch_size")
            if size is not None and size.default is not size.empty and not name.startswith("_"):
                stated.add(size.default)
    assert stated <= set(RUNTIME_BATCHES)
    assert {point.rows for point in runtime_points(BATCH_ONLY)} == set(RUNTIME_BATCHES)
    assert {point.rows for point in runtime_points(IMAGE, (16,))} == {16}


def test_batches_that_no_point_has_are_told() -> None:
    points = (*grid_for(TEXT), *runtime_points(TEXT, (32, 64)))
    assert batches_left_out(TEXT, points) == (4, 8, 16)
    assert batches_left_out(TEXT, (*points, *runtime_points(TEXT))) == ()
    assert batches_left_out(signature(Axis("batch", 1, 8)), ()) == (4, 8)
    assert batches_left_out(signature(SEQUENCE), ()) == ()


def test_every_length_of_a_short_range_is_tried_one_row_at_a_time() -> None:
    rows = {point.sizes["sequence"]: point.rows for point in reversed(runtime_points(TEXT))}
    assert sorted(rows) == list(range(1, 78))
    assert {count for length, count in rows.items() if length != 3} == {1}
    assert {point.rows for point in runtime_points(TEXT) if point.sizes["sequence"] == 3} == {1, *RUNTIME_BATCHES}


def test_of_a_long_range_the_first_lengths_and_a_draw_are_tried() -> None:
    case = signature(Axis("batch"), Axis("sequence", 1, 8192))
    points = runtime_points(case)
    assert points == runtime_points(case)
    lengths = {point.sizes["sequence"] for point in points}
    assert set(range(1, 65)) < lengths
    assert len(lengths - set(range(1, 65))) == 12
    assert max(lengths) <= 512
    drawn = runtime_points(case, (64,), every_length=False, longest=64)
    assert len(drawn) == 13
    assert max(point.sizes["sequence"] for point in drawn) <= 64


def test_a_decoder_is_tried_at_every_length_of_its_cache() -> None:
    total = Axis("total", 1, 64, sum_of=("past_sequence", "sequence"))
    case = signature(Axis("batch"), Axis("sequence", 1, 64), Axis("past_sequence", 0, 64), total)
    points = runtime_points(case, ())
    assert {point.sizes["sequence"] for point in points if point.sizes["past_sequence"] == 0} == set(range(1, 65))
    assert {point.sizes["past_sequence"] for point in points if point.sizes["sequence"] == 1} == set(range(64))
    assert all(point.sizes["total"] == point.sizes["sequence"] + point.sizes["past_sequence"] for point in points)


def test_a_batch_that_does_not_fit_is_left_out() -> None:
    bytes_of_16 = point_bytes(BATCH_ONLY, {"batch": 16})
    assert {point.rows for point in runtime_points(BATCH_ONLY, budget_bytes=bytes_of_16)} == {4, 8, 16}


def test_the_scores_of_attention_between_patches_are_bounded() -> None:
    """Pixels take little, and the scores of every pair of patches in each head gigabytes."""
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, "height", "width"))
    case = Signature((pixels,), OUTPUT, (Axis("batch"), Axis("height", 16, 1024, 16), Axis("width", 16, 1024, 16)))

    def scores(point: GridPoint) -> int:
        return 4 * 8 * point.rows * (point.sizes["height"] * point.sizes["width"] // 256) ** 2

    budget = 256 << 20
    grid = grid_for(case, budget_bytes=budget, attention=Attention(4, budget))
    assert max(map(scores, grid_for(case))) > 4 * budget
    assert max(map(scores, grid)) <= budget
    # Large images are still there, and so are both ends of an axis.
    assert max(map(scores, grid)) > budget / 4
    assert {point.sizes["width"] for point in grid} >= {16, 1024}
    assert {point.rows for point in grid} == set(BATCHES)
    assert "grid points" in left_out(case, grid)
