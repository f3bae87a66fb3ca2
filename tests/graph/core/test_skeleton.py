"""Weights leave the graph and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_export.graph.core.skeleton import SKELETON_THRESHOLD_BYTES, attach_weights, detach_weights

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((40, 40)).astype(np.float32)
SMALL = RNG.standard_normal(40).astype(np.float32)
TEXT = """g (float[batch, 40] x) => (float[batch, 40] y) {
    h = MatMul(x, large)
    y = Add(h, small)
}"""
Parse = Callable[..., ir.Model]
Run = Callable[..., list[Any]]


def test_round_trip_computes_the_same(parse: Parse, run: Run) -> None:
    model = parse(TEXT, {"large": LARGE, "small": SMALL})
    x = RNG.standard_normal((3, 40)).astype(np.float32)
    expected = run(model, {"x": x})
    weights = detach_weights(model)
    assert set(weights) == {"large"}
    assert [value.name for value in model.graph.inputs] == ["x", "large"]
    assert list(model.graph.initializers) == ["small"]
    assert np.allclose(run(model, {"x": x, "large": LARGE})[0], expected[0])
    attach_weights(model, weights)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == {"large", "small"}
    assert np.array_equal(run(model, {"x": x})[0], expected[0])


def test_detached_graph_is_small_and_knows_its_shapes(parse: Parse) -> None:
    model = parse(TEXT, {"large": LARGE, "small": SMALL})
    detach_weights(model)
    assert len(ir.to_proto(model).SerializeToString()) < LARGE.nbytes / 4
    (value,) = [value for value in model.graph.inputs if value.name == "large"]
    assert value.shape == ir.Shape((40, 40))
    assert value.dtype == ir.DataType.FLOAT


def test_weights_survive_another_tools_round_trip(parse: Parse, run: Run) -> None:
    model = parse(TEXT, {"large": LARGE, "small": SMALL})
    x = RNG.standard_normal((2, 40)).astype(np.float32)
    expected = run(model, {"x": x})[0]
    weights = detach_weights(model)
    other = ir.from_proto(ir.to_proto(model))
    attach_weights(other, weights)
    # The tensor itself, not a copy: it may be larger than memory.
    assert other.graph.initializers["large"].const_value is weights["large"]
    assert np.array_equal(run(other, {"x": x})[0], expected)


def test_unused_weights_are_dropped(parse: Parse) -> None:
    model = parse(TEXT, {"large": LARGE, "small": SMALL})
    weights = detach_weights(model)
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    matmul.replace_input_with(1, model.graph.inputs[0])
    attach_weights(model, weights)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["small"]


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 3 * SKELETON_THRESHOLD_BYTES // 4), min_size=1, max_size=6), data=st.data())
def test_exactly_what_exceeds_the_threshold_leaves(sizes: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.sampled_from([0, 4 * sizes[0], 4 * sizes[0] - 1, SKELETON_THRESHOLD_BYTES]))
    values = {f"w{i}": np.zeros(size, np.float32) for i, size in enumerate(sizes)}
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="g")
    for name, array in values.items():
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    model = ir.Model(graph, ir_version=10)
    weights = detach_weights(model, threshold)
    assert set(weights) == {name for name, array in values.items() if array.nbytes > threshold}
    assert {value.name for value in graph.inputs} == set(weights)
    assert set(graph.initializers) | set(weights) == set(values)


def test_weights_that_are_inputs_stay_inputs() -> None:
    # Models of IR version 3 list every weight among the inputs.
    text = """<ir_version: 3, opset_import: ["" : 8]> g (float[2,64] x, float[64,64] w) => (float[2,64] y)
        { y = MatMul(x, w) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    model = ir.from_proto(proto)
    weights = detach_weights(model)
    skeleton = ir.to_proto(model)
    assert [entry.name for entry in skeleton.graph.input] == ["x", "w"]
    assert not skeleton.graph.initializer
    onnx.checker.check_model(skeleton, full_check=True)
    attach_weights(model, weights)
    back = ir.to_proto(model).graph
    assert [entry.name for entry in back.input] == ["x", "w"]
    assert [entry.name for entry in back.initializer] == ["w"]
    assert np.array_equal(onnx.numpy_helper.to_array(back.initializer[0]), np.eye(64))
