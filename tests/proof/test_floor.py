"""How noise is measured, and how gates follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest

from vlm_export.errors import InputError
from vlm_export.proof.deviation import Deviation, measure_deviation, worst_by_output
from vlm_export.proof.floor import ELSEWHERE, RULES, Floor, FloorJudge, floor_from_json, judge_deviation
from vlm_export.proof.metrics import Array


def rows(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((3, 500))


def test_equal_arrays_deviate_by_nothing() -> None:
    for array in (rows(), np.zeros((2, 3)), np.zeros((0, 4)), np.float32(2.0), np.arange(4)):
        assert measure_deviation(np.asarray(array), np.asarray(array)) == Deviation(0.0, 0.0, 0.0)


def test_a_scale_is_seen_whole_and_noise_cancels_in_it() -> None:
    scaled = measure_deviation(rows(), rows() * 1.005)
    assert scaled.row_error == pytest.approx(0.005)
    assert scaled.scale == pytest.approx(0.005)
    noisy = measure_deviation(rows(), rows() + 0.005 * rows(1))
    assert noisy.row_error == pytest.approx(0.005, rel=0.2)
    assert noisy.scale < 0.0005


def test_the_worst_row_counts_and_a_tiny_one_is_measured_against_the_others() -> None:
    wrong = rows()
    wrong[1] *= -1
    assert measure_deviation(rows(), wrong).row_error == pytest.approx(2.0)
    tiny = rows()
    tiny[1] *= 1e-12
    assert measure_deviation(tiny, tiny + 1e-9).row_error < 1e-6


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_deviation(rows(), rows() + 1e-3 * rows(1))
    monkeypatch.setattr("vlm_export.proof.metrics._BLOCK_VALUES", 7)
    blocked = measure_deviation(rows(), rows() + 1e-3 * rows(1))
    assert (blocked.row_error, blocked.max_abs) == pytest.approx((whole.row_error, whole.max_abs), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    broken = rows()
    broken[2, 3] = bad
    floor = Floor("fp32", {"y": Deviation(1e-7, 1e-7, 1e-7)}, "")
    assert len(judge_deviation(measure_deviation(rows(), broken), floor, "y")) == 3
    assert math.isnan(measure_deviation(rows(), rows()[:2]).row_error)


def test_a_gate_is_a_multiple_of_the_floor_and_never_nothing() -> None:
    floor = Floor("fp32", {"y": Deviation(1e-6, 2e-6, 1e-7), "looked_up": Deviation(0.0, 0.0, 0.0)}, "")
    gate = floor.gate("y")
    assert gate is not None
    assert (gate.row_error, gate.max_abs, gate.scale) == pytest.approx((8e-6, 16e-6, 2e-6))
    least = floor.gate("looked_up")
    assert least is not None
    assert least.row_error == 8 * RULES["fp32"].least
    assert floor.gate("z") is None
    assert judge_deviation(Deviation(9e-6, 0, 0), floor, "y") == [
        "relative error of a row: expected at most 8e-06 (measured noise: 1e-06), got 9e-06"
    ]
    assert judge_deviation(Deviation(7e-6, 15e-6, 1.9e-6), floor, "y") == []


def test_a_noisier_point_is_judged_by_its_own_noise() -> None:
    floor = Floor("fp32", {"y": Deviation(1e-7, 1e-7, 1e-8)}, "")
    measured: list[str] = []

    def noise_of(inputs: Mapping[str, Array]) -> dict[str, Deviation]:
        measured.extend(inputs)
        return {"y": Deviation(1e-6, 1e-6, 1e-8)}

    judge, noisy = FloorJudge(floor, noise_of), {"y": Deviation(4e-6, 4e-6, 0.0)}
    assert judge.judge({"y": Deviation(1e-7, 0.0, 0.0)}, {"x": rows()}) == {}
    assert measured == []
    assert judge.judge(noisy, {"x": rows()}) == {}
    assert measured == ["x"]
    assert judge.floor.outputs["y"].row_error == 1e-6
    assert judge.judge({"y": Deviation(4e-5, 0.0, 0.0)}, {"x": rows()})
    assert FloorJudge(floor).judge(noisy, {})


def test_a_record_is_read_back_with_room_for_other_machines() -> None:
    floor = Floor("fp16", {"y": Deviation(1e-3, 2e-3, 1e-4)}, "the reference against itself")
    record = json.loads(json.dumps(floor.to_json({"y": Deviation(5e-4, 5e-4, 0.0)})))
    assert record["outputs"]["y"]["seen"]["row_error"] == 5e-4
    read = floor_from_json(record, "manifest", ELSEWHERE)
    assert read.outputs == floor.outputs
    own, elsewhere = floor.gate("y"), read.gate("y")
    assert own is not None
    assert elsewhere is not None
    assert elsewhere.row_error == pytest.approx(ELSEWHERE * own.row_error)


@pytest.mark.parametrize("value", [-1e-9, 1.0, "1e-7", True, None])
def test_a_record_that_was_tampered_with_is_refused(value: object) -> None:
    record = Floor("fp32", {"y": Deviation(1e-7, 1e-7, 1e-7)}, "").to_json({})
    record["outputs"]["y"]["floor"]["scale"] = value
    with pytest.raises(InputError, match="scale"):
        floor_from_json(record, "manifest", ELSEWHERE)
    with pytest.raises(InputError, match="missing fields"):
        floor_from_json({"rule": "fp32"}, "manifest", ELSEWHERE)


def test_the_worst_of_points_is_each_number_s() -> None:
    points = [{"y": Deviation(1, 2, 3)}, {"y": Deviation(3, 1, 2), "z": Deviation(0, 0, 0)}]
    assert worst_by_output(points) == {"y": Deviation(3, 2, 3), "z": Deviation(0, 0, 0)}
