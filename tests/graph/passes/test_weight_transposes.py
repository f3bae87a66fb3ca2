"""Transposes of weights become transposed weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlm_export.graph.passes.fold_weights import fold_weight_transposes

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((6, 4)).astype(np.float32)
SQUARE = RNG.standard_normal((4, 4)).astype(np.float32)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Parse = Callable[..., ir.Model]
Run = Callable[..., list[Any]]
Operators = Callable[[ir.Model], list[str]]


def _same_after(model: ir.Model, run: Run, feeds: dict[str, Any], folds: int) -> None:
    before = run(model, feeds)
    assert fold_weight_transposes(model) == folds
    for left, right in zip(run(model, feeds), before, strict=True):
        assert np.array_equal(left, right)


def test_linear_layer(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4] x) => (float[b, 6] y) {
        t = Transpose<perm=[1, 0]>(w)
        y = MatMul(x, t)
    }"""
    model = parse(text, {"w": MATRIX})
    _same_after(model, run, {"x": X}, 1)
    assert operators(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["w.transposed"]


def test_transpose_without_perm_reverses(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 5] x) => (float[2, 3, b, 5] y) {
        t = Transpose(w)
        y = Add(x, t)
    }"""
    model = parse(text, {"w": RNG.standard_normal((5, 1, 3, 2)).astype(np.float32)})
    _same_after(model, run, {"x": RNG.standard_normal((4, 5)).astype(np.float32)}, 1)
    assert operators(model) == ["Add"]


@pytest.mark.parametrize("perm", list(permutations(range(3))))
def test_every_permutation(parse: Parse, run: Run, perm: tuple[int, ...]) -> None:
    text = f"""g (float[1] x) => (float[a, b, c] y) {{
        t = Transpose<perm={list(perm)}>(w)
        y = Mul(t, x)
    }}"""
    model = parse(text, {"w": RNG.standard_normal((2, 3, 4)).astype(np.float32)})
    _same_after(model, run, {"x": np.ones(1, np.float32)}, 1)


def test_weight_shared_by_two_transposes_is_written_once(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4] x) => (float[b, 6] y) {
        s = Transpose<perm=[1, 0]>(w)
        t = Transpose<perm=[1, 0]>(w)
        l = MatMul(x, s)
        r = MatMul(x, t)
        y = Add(l, r)
    }"""
    model = parse(text, {"w": MATRIX})
    _same_after(model, run, {"x": X}, 1)
    assert operators(model) == ["MatMul", "MatMul", "Add"]
    assert list(model.graph.initializers) == ["w.transposed"]


def test_weight_with_two_permutations(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[1] x) => (float[3, 2, 4] y, float[4, 3, 2] z) {
        s = Transpose<perm=[1, 0, 2]>(w)
        t = Transpose<perm=[2, 1, 0]>(w)
        y = Mul(s, x)
        z = Mul(t, x)
    }"""
    model = parse(text, {"w": RNG.standard_normal((2, 3, 4)).astype(np.float32)})
    _same_after(model, run, {"x": np.ones(1, np.float32)}, 2)
    assert operators(model) == ["Mul", "Mul"]
    assert len(model.graph.initializers) == 2


def test_weight_that_is_used_as_it_is_stays(parse: Parse, run: Run) -> None:
    text = """g (float[b, 4] x) => (float[b, 4] y) {
        t = Transpose<perm=[1, 0]>(w)
        h = MatMul(x, t)
        y = MatMul(h, w)
    }"""
    model = parse(text, {"w": SQUARE})
    _same_after(model, run, {"x": X}, 1)
    assert set(model.graph.initializers) == {"w", "w.transposed"}


def test_transpose_of_an_activation_stays(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4] x) => (float[4, b] y) {
        h = Add(x, w)
        y = Transpose<perm=[1, 0]>(h)
    }"""
    model = parse(text, {"w": SQUARE[0]})
    _same_after(model, run, {"x": X}, 0)
    assert operators(model) == ["Add", "Transpose"]


def test_transposed_weight_that_is_an_output_stays(parse: Parse, run: Run) -> None:
    text = """g (float[b, 4] x) => (float[4, 6] t, float[b, 6] y) {
        t = Transpose<perm=[1, 0]>(w)
        y = MatMul(x, t)
    }"""
    model = parse(text, {"w": MATRIX})
    _same_after(model, run, {"x": X}, 0)
    assert [value.name for value in model.graph.outputs] == ["t", "y"]


def test_folded_weights_are_computed_when_they_are_asked_for(parse: Parse) -> None:
    model = parse(
        """g (float[b, 4] x) => (float[b, 6] y) {
        t = Transpose<perm=[1, 0]>(w)
        y = MatMul(x, t)
    }""",
        {"w": MATRIX},
    )
    fold_weight_transposes(model)
    tensor = model.graph.initializers["w.transposed"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert not tensor.cache
    assert np.array_equal(tensor.numpy(), MATRIX.T)
