"""What validation accepts and refuses, of any size."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import infer, validate

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_sound_models_pass_and_stay_as_they_are(random_graphs: ModuleType, seed: int) -> None:
    model = random_graphs.random_model(seed).model
    data = ir.to_proto(model).SerializeToString()
    validate(model)
    assert ir.to_proto(model).SerializeToString() == data


def _swap(model: ir.Model) -> None:
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])


def _cycle(model: ir.Model) -> None:
    nodes = list(model.graph)
    nodes[0].replace_input_with(0, nodes[-1].outputs[0])


def _name_twice(model: ir.Model) -> None:
    nodes = list(model.graph)
    nodes[0].outputs[0].name = nodes[1].outputs[0].name


def _dangle(model: ir.Model) -> None:
    model.graph[0].replace_input_with(0, ir.val("nowhere", ir.DataType.FLOAT, [2]))


def _clash(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.BOOL)


def _attribute(model: ir.Model) -> None:
    model.graph[0].attributes.add(ir.AttrInt64("axis", 1))


def _outer(model: ir.Model) -> None:
    branch = model.graph[1].attributes["then_branch"].as_graph()
    branch.outputs[0] = ir.val(str(model.graph[0].outputs[0].name))


def _opset_of_the_future(model: ir.Model) -> None:
    model.opset_imports[""] = 99


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_swap, "before what they read"),
        (_cycle, "has a cycle"),
        (_name_twice, "defines tensors twice"),
        (_dangle, "which nothing makes"),
        (_clash, "do not fit together"),
        (_attribute, "checker refuses"),
        (_outer, "which nothing in it makes"),
        (_opset_of_the_future, "opset that ONNX"),
    ],
)
def test_faults_are_named(spoil: Callable[[ir.Model], None], message: str) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 18]>\ng (float[N] x, bool c) => (float[N] y) { a = Relu(x)\n'
        " b = If (c) <then_branch = t () => (float[N] p) { p = Add(a, x) }, else_branch = e () => (float[N] q)"
        " { q = Identity(a) }>\n y = Neg(b) }"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    validate(model)
    spoil(model)
    with pytest.raises(GraphError, match=message):
        validate(model)


def test_weights_are_not_read() -> None:
    def read() -> ir.Tensor:  # type: ignore[type-arg] # any array
        raise AssertionError("a weight was read")

    shape = ir.Shape([1 << 20, 4])
    outer = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name="w")
    inner = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name="inner")
    x, flag = ir.val("x", ir.DataType.FLOAT, ["N", 1 << 20]), ir.val("c", ir.DataType.BOOL, [])
    weight = ir.Value(name="w", const_value=outer, shape=shape, type=x.type)
    branches = {}
    for name in ("then_branch", "else_branch"):
        # One branch returns a weight of its own.
        own = ir.Value(name="inner", const_value=inner, shape=shape, type=x.type)
        branches[name] = ir.Graph([], [own], nodes=[], initializers=[own], name=name)
    choice = ir.node("If", [flag], branches, num_outputs=1, name="if")
    total = ir.node("Add", [choice.outputs[0], weight], num_outputs=1, name="add")
    product = ir.node("MatMul", [x, total.outputs[0]], num_outputs=1, name="product")
    product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = "y", x.type, ir.Shape(["N", 4])
    graph = ir.Graph(
        [x, flag], [product.outputs[0]], nodes=[choice, total, product], initializers=[weight], name="g",
        opset_imports={"": 18},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    validate(model)
    infos = infer(model.clone())
    assert {str(info.shape) for value, info in infos.items() if value.name == "y"} == {"[N,4]"}
    assert np.prod(shape.numpy()) * 4 == outer.nbytes
