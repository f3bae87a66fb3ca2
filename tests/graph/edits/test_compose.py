"""Random models put one behind the other, against running them one after the other."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.edits.compose import compose
from vlm_export.graph.edits.extract import extract

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_composed_models_compute_one_after_the_other(random_graphs: ModuleType, seed: int) -> None:
    one, two = random_graphs.random_model(seed), random_graphs.random_model(seed + 1000)
    rng = random.Random(seed)
    data = [ir.to_proto(case.model).SerializeToString() for case in (one, two)]
    pairs = [
        (str(out.name), str(into.name))
        for out in one.model.graph.outputs
        for into in two.model.graph.inputs
        if out.type == into.type and str(out.shape) == str(into.shape) and not into.is_initializer()
    ]
    connections = [rng.choice(pairs)] if pairs else []
    model = compose(one.model, two.model, connections, prefix_second="two/")
    assert [ir.to_proto(case.model).SerializeToString() for case in (one, two)] == data
    random_graphs.check(model)
    firsts = random_graphs.compute(one.model, one.feeds)
    second_feeds = [
        {**feed, **{into: first[out] for out, into in connections}}
        for feed, first in zip(two.feeds, firsts, strict=True)
    ]
    seconds = random_graphs.compute(two.model, second_feeds)
    taken = {out for out, _ in connections}
    expected = [
        {**{n: a for n, a in first.items() if n not in taken}, **{f"two/{n}": a for n, a in second.items()}}
        for first, second in zip(firsts, seconds, strict=True)
    ]
    feeds = [
        {**first, **{f"two/{name}": array for name, array in second.items()}}
        for first, second in zip(one.feeds, two.feeds, strict=True)
    ]
    assert random_graphs.same(random_graphs.compute(model, feeds), expected)


@pytest.mark.parametrize("seed", range(20))
def test_names_that_both_have_are_refused(random_graphs: ModuleType, seed: int) -> None:
    one, two = random_graphs.random_model(seed).model, random_graphs.random_model(seed + 1000).model
    data = [ir.to_proto(model).SerializeToString() for model in (one, two)]
    with pytest.raises(GraphError, match="tensors of these names"):
        compose(one, two, [])
    assert [ir.to_proto(model).SerializeToString() for model in (one, two)] == data


def _parse(body: str, opset: int = 18) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{body}'))


_FIRST = "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"


@pytest.mark.parametrize(
    ("second", "opset", "pairs", "message"),
    [
        ("g (double[N,4] a) => (double[N,4] b) { b = Neg(a) }", 18, [("y", "a")], "different dtypes"),
        ("g (float[N,5] a) => (float[N,5] b) { b = Neg(a) }", 18, [("y", "a")], "different shapes"),
        ("g (float[N,4,1] a) => (float[N,4,1] b) { b = Neg(a) }", 18, [("y", "a")], "different shapes"),
        ("g (float[N,4] a) => (float[N,4] b) { b = Neg(a) }", 17, [("y", "a")], "different opsets"),
        ("g (float[N,4] a) => (float[N,4] b) { b = Neg(a) }", 18, [("z", "a")], "no output 'z'"),
        ("g (float[N,4] a) => (float[N,4] b) { b = Neg(a) }", 18, [("y", "aa")], "did you mean 'a'"),
        ("g (float[N,4] a) => (float[N,4] b) { b = Neg(a) }", 18, [("y", "a"), ("y", "a")], "fed twice"),
    ],
)
def test_what_does_not_fit_is_refused(second: str, opset: int, pairs: list[tuple[str, str]], message: str) -> None:
    first, other = _parse(_FIRST), _parse(second, opset)
    data = [ir.to_proto(model).SerializeToString() for model in (first, other)]
    with pytest.raises(GraphError, match=message):
        compose(first, other, pairs)
    assert [ir.to_proto(model).SerializeToString() for model in (first, other)] == data


def test_sizes_that_only_meet_inside_are_refused() -> None:
    first = _parse("g (float[N,K] x) => (float[N,K] y) { y = Relu(x) }")
    second = _parse("g (float[R,C] a, float[R,C] b) => (float[R,C] c) { c = Add(a, b) }")
    three = compose(first, second, [("y", "a")])
    assert str(three.graph.outputs[0].shape) == "[N,K]"
    assert str(three.graph.inputs[1].shape) == "[N,K]"
    unequal = _parse("g (float[2,3] x) => (float[2,3] y, float[4,3] z) { y = Relu(x)\n z = Concat <axis = 0> (x, y) }")
    with pytest.raises(GraphError, match="two sizes"):
        compose(unequal, second, [("y", "a"), ("z", "b")])


def test_equal_weights_become_one(random_graphs: ModuleType) -> None:
    weight = "float[4,4] w = {" + ",".join(map(str, range(16))) + "}"
    first = _parse(f"g (float[N,4] x) => (float[N,4] y) <{weight}> {{ y = MatMul(x, w) }}")
    second = _parse(f"g (float[N,4] a) => (float[N,4] b) <{weight}> {{ b = MatMul(a, w) }}")
    model = compose(first, second, [("y", "a")], outputs=["b", "y"])
    assert list(model.graph.initializers) == ["w"]
    assert [value.name for value in model.graph.outputs] == ["b", "y"]
    random_graphs.check(model)
    x = np.eye(4, dtype=np.float32)
    got = random_graphs.compute(model, [{"x": x}])[0]
    weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert (got["b"] == weights @ weights).all()
    other = _parse(f"g (float[N,4] a) => (float[N,4] b) <{weight.replace('15', '16')}> {{ b = MatMul(a, w) }}")
    with pytest.raises(GraphError, match="tensors of these names"):
        compose(first, other, [("y", "a")])


def test_a_name_inside_a_subgraph_must_not_be_hidden() -> None:
    inner = _parse(
        "g (float[N,4] q, bool c) => (float[N,4] r) { r = If (c) <then_branch = t () => (float[N,4] y)"
        " { y = Neg(q) }, else_branch = e () => (float[N,4] p) { p = Abs(q) }> }"
    )
    for one, two, pair in ((_parse(_FIRST), inner, ("y", "q")), (inner, _parse(_FIRST), ("r", "x"))):
        with pytest.raises(GraphError, match="tensors of these names") as caught:
            compose(one, two, [pair])
        assert caught.value.got == "y"
        compose(one, two, [pair], prefix_first="first/")


def test_a_model_behind_itself(random_graphs: ModuleType) -> None:
    model = _parse("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    twice = compose(model, model, [("y", "x")], prefix_second="again/")
    assert [value.name for value in twice.graph.outputs] == ["again/y"]
    random_graphs.check(twice)
    first = extract(twice, None, ["y"])
    assert random_graphs.normal_form(first) == random_graphs.normal_form(model)


def test_functions_of_equal_names_must_be_equal(random_graphs: ModuleType) -> None:
    one, two = random_graphs.random_model(0).model, random_graphs.random_model(1).model
    assert len(compose(one, two, [], prefix_second="b/").functions) == 1
    next(iter(two.functions.values()))[1].op_type = "Sub"
    with pytest.raises(GraphError, match="they differ"):
        compose(one, two, [], prefix_second="b/")
