"""The benchmark of a decoder's variants: it runs on a small bundle, and its page says what it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import decoding
from benchmarks.chat_side import generation, inputs

import vlm_export


@pytest.mark.parametrize("family", ["nanovlm", "blip"])
def test_the_profile_is_of_the_decoder(
    nanovlm_bundle: Callable[[str], Path], blip_bundle: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    bundle = nanovlm_bundle("222m") if family == "nanovlm" else blip_bundle("caption")
    first, later = decoding.profiled(bundle, tmp_path, 1, 2, 3)
    for shares in (first, later):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares[decoding.WEIGHTS], shares[decoding.ATTENTION], shares[decoding.CACHES]) > 0
    generate, form = generation(vlm_export.load(bundle, threads=1))
    tokens = generate(*inputs(*form, 2))
    assert all(0 <= next(tokens) < form[1] for _ in range(3))


def run(start: int, *nodes: tuple[str, int, list[int]]) -> list[dict[str, Any]]:
    """A run of 100 µs with nodes of an operator, a time and the shape of the second input."""
    events: list[dict[str, Any]] = [{"name": "model_run", "cat": "Session", "ts": start, "dur": 100}]
    for number, (operator, micros, shape) in enumerate(nodes):
        args = {"op_name": operator, "input_type_shape": [{"float": [1, 2]}, {"float": shape}]}
        events.append({"name": "a_kernel_time", "cat": "Node", "ts": start + number, "dur": micros, "args": args})
    return events


def test_work_is_told_by_kind_and_the_warm_up_is_left_out() -> None:
    warm = [*run(0, ("Gemm", 90, [2, 2])), *run(200, ("Gemm", 90, [2, 2]))]
    prompt = run(400, ("MatMul", 60, [2, 2]), ("MatMul", 20, [1, 1, 2, 2]), ("Softmax", 20, [1]))
    step = run(600, ("MatMulNBits", 50, [2, 2]), ("Concat", 30, [2]), ("Add", 20, [2]))
    first, later = decoding.shares_of_work([*warm, *prompt, *step], 1)
    assert (first[decoding.WEIGHTS], first[decoding.ATTENTION], first[decoding.SOFTMAX]) == (0.6, 0.2, 0.2)
    assert (later[decoding.WEIGHTS], later[decoding.CACHES], later[decoding.REST]) == (0.5, 0.3, 0.2)


@pytest.mark.parametrize(("first", "token", "reached"), [(0.1, 0.02, True), (0.11, 0.02, False), (0.1, 0.021, False)])
def test_one_variant_has_to_reach_all_of_it(first: float, token: float, reached: bool) -> None:
    def measured(first: float, token: float) -> list[dict[str, Any]]:
        return [{"first_seconds": first, "token_seconds": token, "peak_bytes": 1 << 20}] * 3

    results = {"fp32": measured(0.2, 0.04), "int8": measured(first, token), "int4": measured(0.3, 0.01)}
    shares = dict.fromkeys((decoding.WEIGHTS, decoding.REST), 0.5)
    found = decoding.report_from_results("tiny", results, (shares, shares), 3, 2, 7, 2)
    assert found.reached is reached
    assert found.conclusion.startswith("int8: first token")
