from __future__ import annotations

import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlm_export.errors import InputError
from vlm_export.proof import metrics
from vlm_export.proof.gates import GATES, judge
from vlm_export.proof.metrics import Array, Comparison, compare, worst_of

VALUES = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=VALUES)


def naive(reference: Array, candidate: Array) -> tuple[float, float]:
    """max-abs and smallest cosine, written the obvious way."""
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(left, right, strict=True)]
    return float(np.abs(left - right).max()), min(cosines)


@pytest.mark.parametrize("shape", [(4, 7), (1, 1000), (300, 3), (2, 3, 5)])
@pytest.mark.parametrize("block", [4, 64, 1 << 20])
def test_blocks_give_what_the_whole_gives(shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", block)
    rng = np.random.default_rng(0)
    left = rng.standard_normal(shape).astype(np.float32)
    right = left + rng.standard_normal(shape).astype(np.float32) * 0.1
    result = compare(left, right)
    rows = left.reshape(shape[0], -1), right.reshape(shape[0], -1)
    assert (result.max_abs, result.cosine) == pytest.approx(naive(*rows), rel=1e-12)
    ratios = np.linalg.norm(rows[1].astype(float), axis=1) / np.linalg.norm(rows[0].astype(float), axis=1)
    assert (result.norm_ratio_min, result.norm_ratio_max) == pytest.approx((ratios.min(), ratios.max()), rel=1e-12)
    assert result.max_reference_abs == float(np.abs(left).max())


@given(MATRICES)
def test_an_array_equals_itself(array: Array) -> None:
    result = compare(array, array.copy())
    assert result.max_abs == 0
    assert (result.norm_ratio_min, result.norm_ratio_max) == (1, 1)
    assert result.cosine == pytest.approx(1, abs=1e-12)
    assert judge(result, GATES["fp32"]) == []


@given(MATRICES.filter(lambda a: bool(a.any(axis=1).all())), st.sampled_from([0.25, 0.5, 1.5, 2.0, 8.0]))
def test_scale_shows_in_the_norm_ratio_and_not_in_the_cosine(array: Array, factor: float) -> None:
    result = compare(array.astype(np.float64), array.astype(np.float64) * factor)
    assert result.cosine == pytest.approx(1, abs=1e-9)
    assert (result.norm_ratio_min, result.norm_ratio_max) == pytest.approx((factor, factor), rel=1e-9)
    assert all(judge(result, gate) for gate in GATES.values())


@given(MATRICES, st.integers(0, 2**32 - 1))
def test_the_order_of_rows_does_not_matter(array: Array, seed: int) -> None:
    other = np.roll(array, 1, axis=1)
    order = np.random.default_rng(seed).permutation(len(array))
    left, right = compare(array, other), compare(array[order], other[order])
    assert left.max_abs == right.max_abs
    assert left.cosine == pytest.approx(right.cosine, abs=1e-12)


@given(MATRICES, st.integers(0, 1000), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from(list(GATES)))
def test_one_value_that_is_not_finite_fails_every_gate(array: Array, where: int, value: float, gate: str) -> None:
    bad = array.copy()
    bad.flat[where % bad.size] = value
    assert judge(compare(array, bad), GATES[gate])
    assert judge(compare(bad, array), GATES[gate])
    assert judge(compare(bad, bad.copy()), GATES[gate])


def test_comparisons_of_nan_fail_number_by_number() -> None:
    result = compare(np.ones((2, 3), np.float32), np.full((2, 3), np.nan, np.float32))
    assert math.isnan(result.max_abs)
    texts = judge(result, GATES["fp32"])
    assert [text.split(":")[0] for text in texts] == ["finite", "max-abs", "cosine", "norm ratio"]


def test_zero_rows_are_defined() -> None:
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    same = compare(zeros, zeros)
    assert (same.cosine, same.norm_ratio_min, same.norm_ratio_max) == (1, 1, 1)
    lost, appeared = compare(ones, zeros), compare(zeros, ones)
    assert (lost.cosine, lost.norm_ratio_min) == (0, 0)
    assert (appeared.cosine, appeared.norm_ratio_max) == (0, math.inf)
    assert judge(lost, GATES["fp16"])
    assert judge(appeared, GATES["fp16"])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty_arrays_are_equal(shape: tuple[int, ...]) -> None:
    empty = np.zeros(shape, np.float32)
    assert judge(compare(empty, empty), GATES["fp32"]) == []


def test_a_vector_and_a_scalar_are_one_row() -> None:
    left = np.array([1.0, 1e-9], np.float32)
    assert judge(compare(left, np.array([1.0, -1e-9], np.float32)), GATES["fp32"]) == []
    assert judge(compare(np.float32(2).reshape(()), np.float32(3).reshape(())), GATES["fp32"])


def test_shapes_and_dtypes_are_named() -> None:
    left = np.ones((3, 2), np.float32)
    assert judge(compare(left, left[:1]), GATES["fp16"]) == ["shape: expected float32 (3, 2), got float32 (1, 2)"]
    texts = judge(compare(left, left.astype(np.float64)), GATES["fp16"])
    assert texts == ["dtype: expected float32 (3, 2), got float64 (3, 2)"]


def test_small_outputs_cannot_hide_a_scale_behind_the_absolute_limit() -> None:
    left = np.full((2, 4), 1e-6, np.float32)
    texts = judge(compare(left, left * np.float32(1.5)), GATES["fp32"])
    assert [text.split(":")[0] for text in texts] == ["norm ratio"]


def test_integers_and_booleans_compare() -> None:
    assert compare(np.array([[2**31, 5]]), np.array([[2**31 + 3, 5]])).max_abs == 3
    assert compare(np.array([[True, False]]), np.array([[True, True]])).max_abs == 1


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_whole_numbers_differ_by_whole_numbers(dtype: type[np.integer]) -> None:
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    for left, right in ((high - 100, high), (low, low + 1), (low, high), (0, high), (high, high - 7)):
        for one, other in ((left, right), (right, left)):
            result = compare(np.array([[one, 0]], dtype), np.array([[other, 0]], dtype))
            assert result.max_abs == float(abs(one - other))


@pytest.mark.parametrize("block", [2, 1 << 20])
@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-150, 1.0, 1e150, 1e200, 1e307])
def test_rows_of_any_size_are_judged_alike(scale: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", block)
    row = np.array([3.0, 4.0, 5.0])
    left = np.stack([row, scale * row, row])
    assert judge(compare(left, left.copy()), GATES["fp32"]) == []
    turned = left.copy()
    turned[1] *= -2
    result = compare(left, turned)
    assert (result.cosine, result.norm_ratio_max) == pytest.approx((-1, 2), rel=1e-3 if scale < 1e-300 else 1e-12)
    assert judge(result, GATES["fp16"])


def test_norms_of_different_sizes_have_a_ratio() -> None:
    result = compare(np.full((1, 3), 1e-200), np.full((1, 3), 1e100))
    assert (result.norm_ratio_min, result.norm_ratio_max) == pytest.approx((1e300, 1e300))
    assert compare(np.full((1, 3), 1e-200), np.full((1, 3), 1e200)).norm_ratio_max == math.inf


@pytest.mark.parametrize("array", [np.array([1j]), np.array(["a"]), np.array([{}], object)])
def test_what_is_no_real_number_is_refused(array: Array) -> None:
    with pytest.raises(InputError, match="only real numbers"):
        compare(array, array)
    with pytest.raises(InputError, match="only real numbers"):
        compare(np.ones(1), array)


def test_numbers_that_numpy_lacks_compare() -> None:
    array = np.array([[1.0, 2.5]], ml_dtypes.bfloat16)
    assert judge(compare(array, array.copy()), GATES["fp32"]) == []
    assert compare(array, -array).max_abs == 5


def test_json_is_strict() -> None:
    result = compare(np.ones((1, 2)), np.array([[np.nan, 1]]))
    text = json.dumps(result.to_json(), allow_nan=False)
    assert math.isnan(float(json.loads(text)["max_abs"]))
    appeared = compare(np.zeros((1, 2)), np.ones((1, 2))).to_json()
    assert float(appeared["norm_ratio_max"]) == math.inf


def test_the_worst_is_taken_number_by_number() -> None:
    def at(scale: float) -> Comparison:
        base = np.array([[1.0, 2.0]])
        return compare(base, base * scale)

    worst = worst_of([at(1.1), at(0.5), at(1.0)])
    assert worst.max_abs == pytest.approx(1.0)
    assert worst.norm_ratio_min == pytest.approx(0.5)
    assert worst.norm_ratio_max == pytest.approx(1.1)
    poisoned = worst_of([at(1.0), at(math.nan), at(1.0)])
    assert math.isnan(poisoned.max_abs)
    assert math.isnan(poisoned.cosine)
    assert not poisoned.candidate_finite


def test_large_arrays_are_not_held_twice() -> None:
    left = np.ones((64, 1 << 18), np.float32)  # 64 MiB
    right = left.copy()
    tracemalloc.start()
    compare(left, right)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A few float64 blocks of 8 MiB each; a float64 copy of one side would take 128 MiB.
    assert peak < 64 << 20
