"""Attributes of every type: set, replaced, deleted, and set back."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import all_nodes
from vlm_export.graph.edits.attributes import delete_attribute, set_attribute

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_attribute_set_back_gives_the_original(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model = case.model
    before = random_graphs.normal_form(model)
    changes = {"Blend": ("alpha", 0.125), "Concat": ("axis", 1), "Dropout": ("seed", 7), "Identity": None}
    targets = [node for node in all_nodes(model) if changes.get(node.op_type)]
    node = rng.choice(targets)
    name, value = changes[node.op_type] or ("", 0)
    expected = random_graphs.compute(_with(model, node, name, value), case.feeds)
    old = set_attribute(model, node, name, value)
    random_graphs.check(model)
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)
    if old is None:
        delete_attribute(model, node, name)
    else:
        set_attribute(model, node, name, old)
    assert random_graphs.normal_form(model) == before


def _with(model: ir.Model, node: ir.Node, name: str, value: object) -> ir.Model:
    """A model read from the file again, with the attribute set on the node of the same place."""
    other = ir.from_proto(ir.to_proto(model))
    place = list(all_nodes(model)).index(node)
    list(all_nodes(other))[place].attributes.add(ir.convenience.convert_attribute(name, value))  # type: ignore[arg-type] # any value
    return other


def _custom() -> ir.Model:
    text = '<ir_version: 10, opset_import: ["" : 18, "any" : 1]>\ng (float[N] x) => (float[N] y) { y = any.Op(x) }'
    return ir.from_proto(onnx.parser.parse_model(text))


_BRANCH = ir.Graph([], [], nodes=[ir.node("Constant", [], {"value_float": 1.0}, num_outputs=1)], name="inner")
_TYPE = ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT), ir.Shape([2]))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "INT"),
        (np.int64(3), "INT"),
        (0.5, "FLOAT"),
        ("text", "STRING"),
        (np.ones((2, 2), np.float16), "TENSOR"),
        (_BRANCH, "GRAPH"),
        (_TYPE, "TYPE_PROTO"),
        ([1, 2], "INTS"),
        ([0.5, 1], "FLOATS"),
        (["a", "b"], "STRINGS"),
        ([np.zeros(2), np.ones(3)], "TENSORS"),
        ([_BRANCH, _BRANCH], "GRAPHS"),
        ([_TYPE], "TYPE_PROTOS"),
    ],
)
def test_every_type_is_written_and_read_again(value: object, kind: str) -> None:
    model = _custom()
    assert set_attribute(model, "y", "extra", value) is None
    read = ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))
    assert read.graph[0].attributes["extra"].type.name == kind
    assert str(ir.to_proto(read)) == str(ir.to_proto(model))
    empty = set_attribute(model, "y", "none", [], kind=ir.AttributeType.FLOATS)
    assert empty is None
    delete_attribute(model, "y", "extra")
    delete_attribute(model, "y", "none")
    assert str(ir.to_proto(model)) == str(ir.to_proto(_custom()))


def test_a_new_branch_reads_outer_tensors(random_graphs: ModuleType) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 18]>\ng (float[N] x, bool c) => (float[N] y) { a = Relu(x)\n'
        " y = If (c) <then_branch = t () => (float[N] b) { b = Neg(a) },"
        " else_branch = e () => (float[N] d) { d = Abs(a) }> }"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    # Outer tensors are named, not held.
    node = ir.node("Exp", [ir.val("a")], num_outputs=1)
    node.outputs[0].name = "other"
    old = set_attribute(model, "y", "then_branch", ir.Graph([], list(node.outputs), nodes=[node], name="t"))
    random_graphs.check(model)
    feeds = [{"x": np.array([0.0], np.float32), "c": np.array(True)}]
    assert random_graphs.compute(model, feeds)[0]["y"].tolist() == [1.0]
    assert old is not None
    set_attribute(model, "y", "then_branch", old)
    random_graphs.check(model)
    assert random_graphs.compute(model, feeds)[0]["y"].tolist() == [0.0]
    stray = ir.node("Exp", [ir.val("nothing")], num_outputs=1)
    stray.outputs[0].name = "other"
    data = ir.to_proto(model).SerializeToString()
    with pytest.raises(GraphError, match="visible in graph"):
        set_attribute(model, "y", "then_branch", ir.Graph([], list(stray.outputs), nodes=[stray], name="t"))
    assert ir.to_proto(model).SerializeToString() == data


def test_refusals_leave_no_trace() -> None:
    text = "g (float[N,3] x) => (float[3,N] y) { y = Transpose <perm = [1, 0]> (x) }"
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}'))
    data = ir.to_proto(model).SerializeToString()
    for name, value, message in (
        ("prem", [0, 1], "did you mean 'perm'"),
        ("perm", [0.5, 1.0], "another type"),
        ("perm", 1, "another type"),
        ("perm", [0, 1, 2], "do not fit together"),
    ):
        with pytest.raises(GraphError, match=message):
            set_attribute(model, "y", name, value)
        assert ir.to_proto(model).SerializeToString() == data
    with pytest.raises(GraphError, match="has no attribute"):
        delete_attribute(model, "y", "axis")
    set_attribute(model, "y", "perm", [0, 1])
    # The interface follows.
    assert str(model.graph.outputs[0].shape) == "[N,3]"
