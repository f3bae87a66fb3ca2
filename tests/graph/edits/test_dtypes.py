"""Dtypes of inputs and outputs changed by casts, and back."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.edits.dtypes import set_dtype

SEEDS = range(40)
_FLOATS = {"float32": np.float32, "float64": np.float64, "float16": np.float16}


@pytest.mark.parametrize("seed", SEEDS)
def test_casts_stand_at_the_interface_and_go_again(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model, before = case.model, random_graphs.normal_form(case.model, infos=False)
    feeds = [dict(feed.items()) for feed in case.feeds]
    values = [value for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype is not None]
    floats = [value for value in values if value.dtype.name in ("FLOAT", "DOUBLE") and not value.is_initializer()]
    chosen = {str(value.name): rng.choice(list(_FLOATS)) for value in rng.sample(floats, min(3, len(floats)))}
    old = {str(value.name): value.dtype for value in floats if value.name in chosen}
    inputs = {str(value.name) for value in model.graph.inputs}
    through = [{name: _through(name, array, chosen) for name, array in feed.items()} for feed in case.feeds]
    expected = [
        {name: array.astype(_FLOATS[chosen[name]]) if name in chosen else array for name, array in outputs.items()}
        for outputs in random_graphs.compute(model, through)
    ]
    changed = sum(dtype.numpy() != _FLOATS[chosen[name]] for name, dtype in old.items() if dtype is not None)
    assert set_dtype(model, chosen) == changed
    random_graphs.check(model)
    for feed in feeds:
        feed.update({name: feed[name].astype(_FLOATS[chosen[name]]) for name in inputs & chosen.keys()})
    assert random_graphs.same(random_graphs.compute(model, feeds), expected)
    set_dtype(model, {name: dtype for name, dtype in old.items() if dtype is not None})
    assert random_graphs.normal_form(model, infos=False) == before


def _through(name: str, array: np.ndarray, chosen: dict[str, str]) -> np.ndarray:
    return array.astype(_FLOATS[chosen[name]]).astype(array.dtype) if name in chosen else array


def test_weights_and_inner_tensors_keep_their_dtypes(random_graphs: ModuleType) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 18]>\n'
        "g (float[N,2] x) => (float[N,2] y, float[N,2] z) <float[2,2] w = {1,2,3,4}> { y = MatMul(x, w)\n z = Relu(y) }"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert set_dtype(model, {"x": "float16", "y": ir.DataType.FLOAT16}) == 2
    assert [node.op_type for node in model.graph] == ["Cast", "MatMul", "Cast", "Relu"]
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    # The other output is computed from the tensor before its cast.
    relu = list(model.graph)[-1]
    assert relu.inputs[0] is list(model.graph)[1].outputs[0]
    random_graphs.check(model)


def test_refusals_leave_no_trace(random_graphs: ModuleType) -> None:
    model = random_graphs.random_model(1).model
    data = ir.to_proto(model).SerializeToString()
    for dtypes, message in (
        ({"in_9": "float16"}, "did you mean"),
        ({"in_0": "flaot16"}, "did you mean 'float16'"),
        ({"in_0": "float16", "in_1": "float8e4m3fnuzz"}, "did you mean"),
    ):
        with pytest.raises(GraphError, match=message):
            set_dtype(model, dtypes)
        assert ir.to_proto(model).SerializeToString() == data


def test_what_is_input_and_output_at_once_has_one_dtype() -> None:
    graph = ir.Graph([x := ir.val("x", ir.DataType.FLOAT, [2])], [x], nodes=[], opset_imports={"": 18})
    with pytest.raises(GraphError, match="at once"):
        set_dtype(ir.Model(graph, ir_version=10), {"x": "float16"})


def test_a_default_value_is_converted(random_graphs: ModuleType) -> None:
    models = (random_graphs.random_model(seed) for seed in SEEDS)
    case = next(case for case in models if any(value.name == "default" for value in case.model.graph.inputs))
    set_dtype(case.model, {"default": "float64"})
    assert case.model.graph.initializers["default"].const_value.dtype == ir.DataType.DOUBLE
    random_graphs.check(case.model)
    random_graphs.compute(case.model, case.feeds)
