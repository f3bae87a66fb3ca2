"""Transposes that undo each other, in graphs made for it: as few as can be, and the same results."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from vlm_export.graph.core.names import all_nodes
from vlm_export.graph.core.onnxruntime_session import run_in_onnxruntime
from vlm_export.graph.passes.cancel_transposes import cancel_transposes

Array = npt.NDArray[Any]
Parse = Callable[[str, Mapping[str, Array]], ir.Model]
X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def transposes(model: ir.Model) -> int:
    return sum(node.op_type == "Transpose" for node in all_nodes(model))


def run(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    outputs = run_in_onnxruntime(proto, feeds)
    assert outputs is not None
    return list(outputs)


CASES = {
    # body → Transposes that remain
    "y = Transpose<perm=[2,0,1]>(x)\n u = Relu(y)\n y1 = Transpose<perm=[1,2,0]>(u)": 0,
    "u = Transpose<perm=[2,0,1]>(x)\n v = Add(u, full)\n w = Mul(c, v)\n y1 = Transpose<perm=[1,2,0]>(w)": 0,
    "u = Transpose<perm=[2,0,1]>(x)\n v = Add(u, last)\n w = Sub(v, v)\n y1 = Transpose<perm=[1,2,0]>(w)": 0,
    # Its own inverse, several times in a row.
    "u = Transpose<perm=[0,2,1]>(x)\n v = Exp(u)\n w = Transpose<perm=[0,2,1]>(v)\n s = Neg(w)\n"
    " t = Transpose<perm=[0,2,1]>(s)\n q = Abs(t)\n y1 = Transpose<perm=[0,2,1]>(q)": 0,
    # Two in a row that are none together, and two that are one.
    "u = Transpose<perm=[2,0,1]>(x)\n v = Transpose<perm=[1,2,0]>(u)\n y1 = Relu(v)": 0,
    "u = Transpose<perm=[2,0,1]>(x)\n v = Transpose<perm=[2,0,1]>(u)\n w = Transpose<perm=[0,2,1]>(v)\n"
    " s = Softmax<axis=0>(w)\n y1 = Transpose<perm=[0,2,1]>(s)": 2,
    # A second reader needs the old layout: one Transpose instead of two.
    "u = Transpose<perm=[2,0,1]>(x)\n v = Relu(u)\n a = Transpose<perm=[1,2,0]>(v)\n s = Softmax<axis=0>(v)\n"
    " b = Transpose<perm=[1,2,0]>(s)\n y1 = Add(a, b)": 2,
    # Both inputs of an addition come from the same layout.
    "u = Transpose<perm=[2,0,1]>(x)\n z = Exp(x)\n v = Transpose<perm=[2,0,1]>(z)\n w = Max(u, v)\n"
    " y1 = Transpose<perm=[1,2,0]>(w)": 0,
    # Nothing to gain: another operator stands between.
    "u = Transpose<perm=[2,0,1]>(x)\n v = Softmax<axis=0>(u)\n y1 = Transpose<perm=[1,2,0]>(v)": 2,
    # A tensor of lower rank that is no constant would need another shape.
    "u = Transpose<perm=[2,0,1]>(x)\n r = ReduceSum<keepdims=0>(u, first)\n v = Add(u, r)\n"
    " y1 = Transpose<perm=[1,2,0]>(v)": 2,
}  # fmt: skip


@pytest.mark.parametrize(("body", "remaining"), CASES.items())
def test_as_few_as_can_be(parse: Parse, body: str, remaining: int) -> None:
    rng = np.random.default_rng(1)
    weights = {
        "full": rng.standard_normal((4, 2, 3)).astype(np.float32),
        "last": rng.standard_normal(3).astype(np.float32),
        "c": np.float32(1.5) * np.ones((), np.float32),
        "first": np.array([0], np.int64),
    }
    body = body.replace("y =", "y0 =").replace("(y)", "(y0)")
    used = {name: array for name, array in weights.items() if f"{name})" in body or f"({name}," in body}
    model = parse(f"g (float[2,3,4] x) => (float[i,j,k] y1) {{ {body} }}", used)
    expected = run(model, {"x": X})
    before = transposes(model)
    assert cancel_transposes(model) == before - remaining
    assert transposes(model) == remaining
    for old, new in zip(expected, run(model, {"x": X}), strict=True):
        assert np.array_equal(old, new)
    assert cancel_transposes(model) == 0


def test_outputs_keep_names_and_layouts(parse: Parse) -> None:
    text = """g (float[2,3,4] x) => (float[4,2,3] u, float[4,2,3] v, float[2,3,4] y, float[2,3,4] y2) {
        u = Transpose<perm=[2,0,1]>(x)
        v = Relu(u)
        y = Transpose<perm=[1,2,0]>(v)
        y2 = Transpose<perm=[1,2,0]>(v)
    }"""
    model = parse(text, {})
    expected = run(model, {"x": X})
    cancel_transposes(model)
    assert [value.name for value in model.graph.outputs] == ["u", "v", "y", "y2"]
    assert transposes(model) == 2
    assert all(map(np.array_equal, expected, run(model, {"x": X})))


def test_named_axes_follow(parse: Parse) -> None:
    text = """g (float[n,3,h,w] x) => (float[n,3,h,w] y) {
        a = Transpose<perm=[0,2,3,1]>(x)
        b = Mul(a, scale)
        y = Transpose<perm=[0,3,1,2]>(b)
    }"""
    model = parse(text, {"scale": np.arange(3, dtype=np.float32)})
    assert cancel_transposes(model) == 2
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert [str(axis) for axis in model.graph.outputs[0].shape or ()] == ["n", "3", "h", "w"]
    (weight,) = model.graph.initializers.values()
    assert weight.const_value is not None
    assert list(weight.const_value.shape.numpy()) == [1, 3, 1, 1]


def test_inside_subgraphs_and_functions() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
    g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
        u = Transpose<perm=[2,0,1]>(x)
        f = local.twice(x)
        y = If (c) <then_branch = g1 () => (float[2,3,4] t) {
            v = Transpose<perm=[1,2,0]>(u)
            p = Transpose<perm=[2,1,0]>(v) r = Relu(p) q = Transpose<perm=[2,1,0]>(r) t = Add(q, f)
        }, else_branch = g2 () => (float[2,3,4] e) { e = Neg(x) }>
    }
    <domain: "local", opset_import: ["" : 18]>
    twice (a) => (b) { k = Constant<value = float[3] {1.0, 2.0, 3.0}>() s = Transpose<perm=[0,2,1]>(a)
        m = Mul(s, k) b = Transpose<perm=[0,2,1]>(m) }"""
    proto = onnx.parser.parse_model(text)
    model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    feeds = [{"x": X, "c": np.array(flag)} for flag in (True, False)]
    expected = [run(model, feed) for feed in feeds]
    # Both of the function, and one of the two in a row in the branch.
    assert cancel_transposes(model) == 3
    assert transposes(model) == 3
    for old, feed in zip(expected, feeds, strict=True):
        assert all(map(np.array_equal, old, run(model, feed)))


class _Generator:
    """Random graphs of Transposes, elementwise operators with constants of all forms, and some others."""

    def __init__(self, seed: int) -> None:
        self._rng, self._numbers = random.Random(seed), np.random.default_rng(seed)
        rank = self._rng.choice([2, 3, 4])
        perms = [tuple(self._rng.sample(range(rank), rank)) for _ in range(2)]
        self._perms = [*perms, *(tuple(np.argsort(perm).tolist()) for perm in perms)]
        shape = tuple(self._rng.sample([2, 3, 4, 5], rank))
        self.shapes: dict[str, tuple[int, ...]] = {"x": shape, "z": shape}
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def build(self) -> onnx.ModelProto:
        for number in range(self._rng.randint(4, 16)):
            self._add(f"v{number}")
        used = {name for node in self._nodes for name in node.input}
        made = list(self.shapes)[2:]
        outputs = [name for name in made if name not in used or self._rng.random() < 0.15]
        infos = {name: helper.make_tensor_value_info(name, 1, shape) for name, shape in self.shapes.items()}
        graph = helper.make_graph(
            self._nodes, "g", [infos["x"], infos["z"]], [infos[name] for name in outputs], self._weights
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model) if self._rng.random() < 0.7 else model

    def _add(self, name: str) -> None:
        rng, source = self._rng, self._rng.choice(list(self.shapes)[-4:])
        shape, kind = self.shapes[source], self._rng.random()
        if kind < 0.45:
            perm = rng.choice(self._perms)
            self._node("Transpose", [source], name, tuple(shape[axis] for axis in perm), perm=perm)
        elif kind < 0.65:
            op_type = rng.choice(["Relu", "Neg", "Abs", "Identity", "Clip"])
            inputs = [source] + ([self._weight(name, ())] if op_type == "Clip" else [])
            self._node(op_type, inputs, name, shape)
        elif kind < 0.8:
            forms = [shape, shape[-1:], (), tuple(size if rng.random() < 0.5 else 1 for size in shape)]
            inputs = [source, self._weight(name, rng.choice(forms))]
            rng.shuffle(inputs)
            self._node(rng.choice(["Add", "Mul", "Sub"]), inputs, name, shape)
        elif kind < 0.95:
            others = [other for other in self.shapes if self.shapes[other] == shape]
            self._node(rng.choice(["Add", "Mul", "Max"]), [source, rng.choice(others)], name, shape)
        else:
            self._node("Softmax", [source], name, shape, axis=0)

    def _node(self, op_type: str, inputs: list[str], name: str, shape: tuple[int, ...], **attributes: Any) -> None:
        self._nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        self.shapes[name] = shape

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        array = self._numbers.standard_normal(shape).astype(np.float32)
        self._weights.append(numpy_helper.from_array(np.asarray(array), f"w_{name}"))
        return f"w_{name}"


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_generated_graphs(first: int) -> None:
    before = after = 0
    for seed in range(first, first + 50):
        generator = _Generator(seed)
        proto = generator.build()
        rng = np.random.default_rng(seed)
        feeds = {name: rng.standard_normal(generator.shapes[name]).astype(np.float32) for name in ("x", "z")}
        model: ir.Model = ir.from_proto(proto)
        expected, count = run(model, feeds), transposes(model)
        assert cancel_transposes(model) == count - transposes(model) >= 0
        assert [value.name for value in model.graph.outputs] == [entry.name for entry in proto.graph.output]
        for old, new in zip(expected, run(model, feeds), strict=True):
            # Softmax sums along another order of memory.
            assert np.allclose(old, new, rtol=1e-6, atol=1e-6), seed
        text = str(ir.to_proto(model))
        assert cancel_transposes(model) == 0
        assert str(ir.to_proto(model)) == text
        before, after = before + count, after + transposes(model)
    assert after < 0.6 * before
