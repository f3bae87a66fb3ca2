"""Lookup in scopes: main graph, subgraphs, functions."""

from __future__ import annotations

from types import ModuleType

import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import (
    all_graphs,
    defined_values,
    find_node,
    find_root,
    find_value,
    fresh_name,
    names_in,
    nested_graphs,
    taken_names,
    visible_value,
)
from vlm_export.graph.edits.io_edits import rename_tensor

SEEDS = range(40)

_TEXT = """<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
g (float[N] x, bool c) => (float[N] y) {
    [first] a = Relu(x)
    [choose] y = If (c) <
        then_branch = t () => (float[N] p) { q = Neg(a)
            [same] p = Abs(q) },
        else_branch = e () => (float[N] r) { q = Exp(x)
            [same] r = f.Double(q) }>
}
<domain: "f", opset_import: ["" : 18]>
Double (a) => (b) { [inner] b = Add(a, a) }
"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(_TEXT))


def test_the_main_graph_comes_first_and_functions_apart(model: ir.Model) -> None:
    assert find_value(model, "a") is model.graph[0].outputs[0]
    assert find_value(model, "p").producer() is find_node(model, "p")
    assert find_value(model, "a", "Double") is find_root(model, "f:Double").inputs[0]
    assert find_node(model, "inner", "Double").op_type == "Add"
    assert find_node(model, "first") is find_node(model, "a")


def test_unknown_and_ambiguous_names(model: ir.Model) -> None:
    for call, message in (
        (lambda: find_value(model, "q"), "not unique"),
        (lambda: find_node(model, "same"), "not unique"),
        (lambda: find_node(model, "frist"), "did you mean 'first'"),
        (lambda: find_value(model, "b"), "no tensor 'b'"),
        (lambda: find_value(model, ""), "no tensor"),
        (lambda: find_root(model, "Duble"), "no function"),
        (lambda: find_value(model, ir.val("x")), "not part of the model"),
        (lambda: find_node(model, ir.node("Relu", [])), "not part of the model"),
    ):
        with pytest.raises(GraphError, match=message):
            call()


def test_what_a_graph_sees(model: ir.Model) -> None:
    then, other = (model.graph[1].attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    assert visible_value(then, model.graph, "a") is model.graph[0].outputs[0]
    assert visible_value(then, model.graph, "q") is then[0].outputs[0]
    with pytest.raises(GraphError, match="visible in graph"):
        visible_value(model.graph, model.graph, "q")
    assert taken_names(model.graph, then) == {"x", "c", "a", "y", "p", "q"}
    assert taken_names(model.graph, model.graph) == {"x", "c", "a", "y", "p", "q", "r"}
    assert names_in(other) == {"q", "r"}


def test_sibling_branches_may_share_a_name(model: ir.Model) -> None:
    then = model.graph[1].attributes["then_branch"].as_graph()
    rename_tensor(model, "p", "r")
    assert then.outputs[0].name == "r"
    with pytest.raises(GraphError, match="already named"):
        rename_tensor(model, then[0].outputs[0], "a")
    rename_tensor(model, "b", "x", function="Double")
    assert model.graph.inputs[0].name == "x"


def test_a_returned_outer_name_and_an_annotation_follow(model: ir.Model) -> None:
    proto = ir.to_proto(model)
    branch = proto.graph.node[1].attribute[0].g
    branch.output[0].name = "a"
    annotation = proto.graph.quantization_annotation.add(tensor_name="x")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="a")
    changed = ir.from_proto(proto)
    rename_tensor(changed, "a", "z")
    written = ir.to_proto(changed)
    assert written.graph.node[1].attribute[0].g.output[0].name == "z"
    assert written.graph.quantization_annotation[0].quant_parameter_tensor_names[0].value == "z"


@pytest.mark.parametrize("seed", SEEDS)
def test_fresh_names_are_free_in_every_scope(random_graphs: ModuleType, seed: int) -> None:
    model = random_graphs.random_model(seed).model
    for graph in nested_graphs(model.graph):
        taken = taken_names(model.graph, graph)
        name = fresh_name(next(iter(sorted(taken))), set(taken))
        assert name not in taken
        assert not any(value.name == name for inner in nested_graphs(graph) for value in defined_values(inner))
    assert len(list(all_graphs(model))) == len(list(nested_graphs(model.graph))) + 1
    used = {"a", "a_1"}
    assert [fresh_name("a", used), fresh_name("a", used), fresh_name("", used)] == ["a_2", "a_3", "value_1"]
