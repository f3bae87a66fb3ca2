"""CastLike with a known target becomes Cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_export.graph.passes.cast_like import replace_cast_likes

Parse = Callable[..., ir.Model]
Run = Callable[..., list[Any]]
Operators = Callable[[ir.Model], list[str]]


def test_known_target(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[n] x) => (float[n] y) {
        c = CastLike(i, x)
        y = Add(x, c)
    }"""
    model = parse(text, {"i": np.array([3], np.int64)})
    x = np.arange(4, dtype=np.float32)
    (before,) = run(model, {"x": x})
    assert replace_cast_likes(model) == 1
    assert operators(model) == ["Cast", "Add"]
    assert np.array_equal(run(model, {"x": x})[0], before)


def test_graph_output(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[n] x, int64[1] i) => (int64[n] y) {
        y = CastLike(x, i)
    }"""
    model = parse(text, {})
    feeds = {"x": np.array([1.7, -2.2], np.float32), "i": np.zeros(1, np.int64)}
    (before,) = run(model, feeds)
    assert replace_cast_likes(model) == 1
    assert operators(model) == ["Cast"]
    (after,) = run(model, feeds)
    assert (after.dtype, after.tolist()) == (before.dtype, before.tolist())
    assert model.graph.outputs[0].name == "y"


def test_unknown_target_stays(parse: Parse, operators: Operators) -> None:
    text = """g (float[n] x) => (float[n] y) {
        h = Relu(x)
        y = CastLike(x, h)
    }"""
    model = parse(text, {})
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.outputs[0].type = None
    assert replace_cast_likes(model) == 0
    assert operators(model) == ["Relu", "CastLike"]
