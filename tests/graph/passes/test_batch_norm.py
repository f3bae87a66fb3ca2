"""Folded batch norms against ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlm_export.graph.passes.fold_weights import fold_batch_norms

Parse = Callable[..., ir.Model]
Run = Callable[..., list[Any]]
Operators = Callable[[ir.Model], list[str]]
NORM = "BatchNormalization<epsilon={epsilon}>(c, gamma, beta, mean, variance)"


def _weights(seed: int, outputs: int, group: int = 1, inputs: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "w": noise(outputs, inputs // group, 3, 3),
        "gamma": noise(outputs),
        "beta": noise(outputs),
        "mean": noise(outputs),
        "variance": rng.uniform(1e-4, 3, outputs).astype(np.float32),
    }


X = np.random.default_rng(9).standard_normal((2, 4, 7, 6)).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("epsilon", "group"), [(1e-5, 1), (0.1, 2), (0.0, 4)])
def test_convolution_and_norm_become_one(
    parse: Parse, run: Run, operators: Operators, seed: int, bias: bool, epsilon: float, group: int
) -> None:
    weights = _weights(seed, 8, group)
    if bias:
        weights["b"] = np.random.default_rng(seed + 50).standard_normal(8).astype(np.float32)
    text = f"""g (float[n, 4, h, w] x) => (float[n, 8, i, j] y) {{
        c = Conv<pads=[1, 1, 1, 1], group={group}>(x, w{", b" if bias else ""})
        y = {NORM.format(epsilon=epsilon or "0.0")}
    }}"""
    model = parse(text, weights)
    (expected,) = run(model, {"x": X})
    assert fold_batch_norms(model) == 1
    assert operators(model) == ["Conv"]
    (got,) = run(model, {"x": X})
    assert np.abs(got - expected).max() <= 2e-5 * max(1, np.abs(expected).max())
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_default_epsilon_is_onnxs(parse: Parse, run: Run) -> None:
    weights = _weights(1, 8)
    weights["variance"] = np.full(8, 1e-6, np.float32)
    text = """g (float[n, 4, h, w] x) => (float[n, 8, i, j] y) {
        c = Conv(x, w)
        y = BatchNormalization(c, gamma, beta, mean, variance)
    }"""
    model = parse(text, weights)
    (expected,) = run(model, {"x": X})
    assert fold_batch_norms(model) == 1
    assert np.allclose(run(model, {"x": X})[0], expected, rtol=1e-4, atol=1e-2)


def test_chain_in_the_middle_of_a_graph(parse: Parse, run: Run, operators: Operators) -> None:
    weights = _weights(2, 4)
    text = f"""g (float[n, 4, h, w] x) => (float[n, 4, i, j] y) {{
        c = Conv<pads=[1, 1, 1, 1]>(x, w)
        d = {NORM.format(epsilon=1e-5)}
        r = Relu(d)
        y = Add(r, x)
    }}"""
    model = parse(text, weights)
    (expected,) = run(model, {"x": X})
    assert fold_batch_norms(model) == 1
    assert operators(model) == ["Conv", "Relu", "Add"]
    assert np.allclose(run(model, {"x": X})[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "body",
    [
        # The convolution's own output is used as well.
        "c = Conv<pads=[1, 1, 1, 1]>(x, w)\n d = {norm}\n y = Add(c, d)",
        # The norm follows something else.
        "e = Conv<pads=[1, 1, 1, 1]>(x, w)\n c = Relu(e)\n y = {norm}",
        # The convolution's weight is computed.
        "v = Mul(w, s)\n c = Conv<pads=[1, 1, 1, 1]>(x, v)\n y = {norm}",
        # The norm's scale is computed.
        "c = Conv<pads=[1, 1, 1, 1]>(x, w)\n t = Mul(gamma, s)\n y = BatchNormalization(c, t, beta, mean, variance)",
    ],
    ids=["used twice", "not a convolution", "computed weight", "computed scale"],
)
def test_what_cannot_be_folded_stays(parse: Parse, run: Run, body: str) -> None:
    text = f"g (float[n, 4, h, w] x, float[1] s) => (float[n, 4, i, j] y) {{ {body.format(norm=NORM)} }}"
    model = parse(text.replace("{epsilon}", "0.00001"), _weights(3, 4))
    feeds = {"x": X, "s": np.full(1, 2, np.float32)}
    before = run(model, feeds)
    assert fold_batch_norms(model) == 0
    assert np.array_equal(run(model, feeds)[0], before[0])


def test_convolution_that_is_an_output_stays(parse: Parse, run: Run) -> None:
    text = f"""g (float[n, 4, h, w] x) => (float[n, 4, i, j] c, float[n, 4, i, j] y) {{
        c = Conv<pads=[1, 1, 1, 1]>(x, w)
        y = {NORM.format(epsilon=1e-5)}
    }}"""
    model = parse(text, _weights(4, 4))
    before = run(model, {"x": X})
    assert fold_batch_norms(model) == 0
    for left, right in zip(run(model, {"x": X}), before, strict=True):
        assert np.array_equal(left, right)


def test_weight_shared_by_two_convolutions(parse: Parse, run: Run) -> None:
    """Each convolution has its own norm, so each needs its own folded weight."""
    weights = _weights(5, 4)
    weights |= {f"{key}2": value[::-1].copy() for key, value in weights.items() if key != "w"}
    text = """g (float[n, 4, h, w] x) => (float[n, 4, i, j] y) {
        c = Conv<pads=[1, 1, 1, 1]>(x, w)
        d = BatchNormalization(c, gamma, beta, mean, variance)
        e = Conv<pads=[1, 1, 1, 1]>(d, w)
        y = BatchNormalization(e, gamma2, beta2, mean2, variance2)
    }"""
    model = parse(text, weights)
    (expected,) = run(model, {"x": X})
    assert fold_batch_norms(model) == 2
    (got,) = run(model, {"x": X})
    assert np.abs(got - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
