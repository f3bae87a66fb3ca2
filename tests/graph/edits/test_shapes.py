"""Shapes and named axes: fixed, renamed, and inferred anew between."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import all_graphs, defined_values
from vlm_export.graph.edits.shapes import set_axis, set_shape

SEEDS = range(40)


def _shapes(model: ir.Model) -> dict[int, str]:
    values = [value for graph in all_graphs(model) for value in defined_values(graph)]
    return {place: str(value.shape) for place, value in enumerate(values) if value.shape is not None}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_renamed_axis_is_renamed_everywhere_and_back(random_graphs: ModuleType, seed: int) -> None:
    case = random_graphs.random_model(seed)
    model, shapes = case.model, _shapes(case.model)
    before, expected = random_graphs.normal_form(model, infos=False), random_graphs.compute(case.model, case.feeds)
    assert set_axis(model, "batch", "N").changed == 3
    after = _shapes(model)
    assert {place: after[place].replace("N", "batch") for place in shapes} == shapes
    assert not any("batch" in shape for shape in after.values())
    random_graphs.check(model)
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)
    set_axis(model, "N", "batch")
    assert random_graphs.normal_form(model, infos=False) == before
    assert shapes.items() <= _shapes(model).items()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fixed_axis_is_fixed_everywhere(random_graphs: ModuleType, seed: int) -> None:
    case = random_graphs.random_model(seed)
    model, shapes = case.model, _shapes(case.model)
    expected = random_graphs.compute(model, case.feeds[1:])
    set_axis(model, "batch", 3)
    after = _shapes(model)
    assert {place: shape.replace("batch", "3") for place, shape in shapes.items()}.items() <= after.items()
    random_graphs.check(model)
    assert random_graphs.same(random_graphs.compute(model, case.feeds[1:]), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_cannot_be_is_refused(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model = case.model
    data = ir.to_proto(model).SerializeToString()
    output = rng.choice(list(model.graph.outputs))
    width = output.shape[1] if output.shape is not None else 0
    # A name for an axis that the graph fixes, another size, another rank, an unknown name, a negative size.
    refused: list[dict[str, list[Any]]] = [{"in_9": ["N", 4]}, {"in_0": [-1, 4]}, {"in_0": ["", 4]}]
    if _is_inferred(model, output):
        refused += [
            {str(output.name): ["batch", "width"]},
            {str(output.name): ["batch", 99]},
            {str(output.name): ["batch", width, 1]},
        ]
    for shapes in refused:
        with pytest.raises(GraphError):
            set_shape(model, shapes)
        assert ir.to_proto(model).SerializeToString() == data
    set_shape(model, {str(output.name): ["rows", width]})
    assert str(output.shape) == f"[rows,{width}]"


def _is_inferred(model: ir.Model, output: ir.Value) -> bool:
    """Whether ONNX tells the output's width when the file does not: not behind a Loop."""
    proto = ir.to_proto(model)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    (found,) = (value for value in inferred.graph.output if value.name == output.name)
    dims = found.type.tensor_type.shape.dim
    return len(dims) == 2 and dims[1].HasField("dim_value")


def _parse(body: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "any" : 1]>\n{body}'))


def test_behind_an_unknown_operator_only_what_depends_is_forgotten() -> None:
    model = _parse(
        "g (float[N,3,32] x, float[M,5] z) => (float[N,3,16] y, float[M,5] u)"
        " <float[N,3,16] a, float[M,5] b> { a = any.Halve(x)\n b = any.Same(z)\n y = Relu(a)\n u = Relu(b) }"
    )
    set_shape(model, {"x": [7, 3, 32]})
    shapes = {node.outputs[0].name: str(node.outputs[0].shape) for node in model.graph}
    assert shapes == {"a": "[7,3,16]", "b": "[M,5]", "y": "[7,3,16]", "u": "[M,5]"}
    # A fixed size that changes may have been behind any other fixed size.
    set_shape(model, {"x": [7, 3, 64]})
    assert str(model.graph[0].outputs[0].shape) == "[None,None,None]"
    assert [str(model.graph[1].outputs[0].shape), str(model.graph[3].outputs[0].shape)] == ["[M,5]", "[M,5]"]


def test_axes_that_part_are_not_renamed_behind_what_is_unknown() -> None:
    model = _parse("g (float[N] x, float[N] z) => (float[N] y) { y = any.Op(x, z) }")
    set_shape(model, {"x": [4]})
    assert str(model.graph.outputs[0].shape) == "[None]"


def test_shapes_that_clash_in_the_graph_are_refused(random_graphs: ModuleType) -> None:
    model = _parse("g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add(x, z) }")
    data = ir.to_proto(model).SerializeToString()
    with pytest.raises(GraphError, match="do not fit together"):
        set_shape(model, {"x": ["N", 3]})
    assert ir.to_proto(model).SerializeToString() == data
    set_shape(model, {"x": ["N", 3], "z": [1, 3]})
    assert str(model.graph.outputs[0].shape) == "[N,3]"
    feeds = [{"x": np.ones((2, 3), np.float32), "z": np.ones((1, 3), np.float32)}]
    assert random_graphs.compute(model, feeds)[0]["y"].shape == (2, 3)


def test_sizes_travel_through_computed_shapes(random_graphs: ModuleType) -> None:
    model = _parse(
        "g (float[B,4] x) => (float[B,2,2] y) <int64[2] tail = {2, 2}, int64[1] zero = {0}>"
        " { s = Shape(x)\n b = Gather(s, zero)\n t = Concat <axis = 0> (b, tail)\n y = Reshape(x, t) }"
    )
    set_shape(model, {"x": [6, 4]})
    assert str(model.graph.outputs[0].shape) == "[6,2,2]"
    random_graphs.check(model)


def test_a_default_value_fixes_the_shape(random_graphs: ModuleType) -> None:
    models = (random_graphs.random_model(seed).model for seed in SEEDS)
    model = next(model for model in models if any(value.name == "default" for value in model.graph.inputs))
    with pytest.raises(GraphError, match="value of another shape"):
        set_shape(model, {"default": [2, 4]})
