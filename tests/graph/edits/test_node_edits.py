"""Nodes removed, inserted and replaced in random models, compared with the same change made in the file by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError, UsageError
from vlm_export.graph.core.names import all_graphs, defined_values, nested_graphs
from vlm_export.graph.edits.node_edits import insert_node, remove_node, replace_node

SEEDS = range(40)
_UNARY = ("Relu", "Neg", "Abs", "Tanh", "Sigmoid", "Identity")


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for graph in all_graphs(model) for node in graph]


def _edited(model: ir.Model, index: int, edit: Callable[[onnx.NodeProto], None]) -> ir.Model:
    """The model with one node changed in its file: the reference, made without the library under test."""
    proto = ir.to_proto(model)
    edit(_protos(proto)[index])
    return ir.from_proto(proto)


def _protos(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """In the order of `_nodes`."""
    found: list[onnx.NodeProto] = []

    def visit(nodes: list[onnx.NodeProto]) -> None:
        found.extend(nodes)
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(list(attribute.g.node))

    visit(list(model.graph.node))
    for function in model.functions:
        visit(list(function.node))
    return found


def _as_identity(node: onnx.NodeProto) -> None:
    node.op_type, node.domain = "Identity", ""
    del node.input[1:], node.output[1:], node.attribute[:]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_removed_node_passes_its_first_input_on(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model, nodes = case.model, _nodes(case.model)
    kinds = (
        *_UNARY,
        "Clip",
        "Add",
        "Mul",
        "Sub",
        "Max",
        "Dropout",
        "Blend",
        "Greater",
        "Cast",
        "If",
        "Split",
        "MatMul",
    )
    index = rng.choice([index for index, node in enumerate(nodes) if node.op_type in kinds])
    data = ir.to_proto(model).SerializeToString()
    interface = [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]
    try:
        reference = _edited(model, index, _as_identity)
        random_graphs.check(reference)
        expected = random_graphs.compute(reference, case.feeds)
    except Exception:
        # The dtype or width changes: the node cannot go, unless ONNX cannot tell (behind a Reshape to a computed size).
        expected = None
    try:
        remove_node(model, nodes[index])
    except GraphError:
        assert ir.to_proto(model).SerializeToString() == data
        assert expected is None
        return
    random_graphs.check(model)
    assert nodes[index] not in _nodes(model)
    assert [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)] == interface
    assert expected is None or random_graphs.same(random_graphs.compute(model, case.feeds), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_inserted_node_changes_all_readers_and_goes_again(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model, expected = case.model, random_graphs.compute(case.model, case.feeds)
    before = random_graphs.normal_form(model)
    floats = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    values = [v for g in nested_graphs(model.graph) for v in defined_values(g) if v.dtype in floats and _is_free(v)]
    value = rng.choice(values)
    reader, at = rng.choice(list(value.uses())) if value.uses() and rng.random() < 0.5 else (None, 0)
    place = {"after": value} if reader is None else {"before": reader, "input_index": at}
    first = insert_node(model, "Neg", **place)
    random_graphs.check(model)
    negated = random_graphs.compute(model, case.feeds)
    second = insert_node(model, "Neg", before=first)
    random_graphs.check(model)
    # Twice the opposite is the same, bit for bit; and once it is not, unless an even function follows.
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)
    remove_node(model, second)
    assert random_graphs.same(random_graphs.compute(model, case.feeds), negated)
    remove_node(model, first)
    assert random_graphs.normal_form(model) == before


def _is_free(value: ir.Value) -> bool:
    # Constant weights of a product are packed by the engine, which rounds otherwise than with computed ones.
    is_packed = value.is_initializer() and any(node.op_type == "MatMul" for node in value.consumers())
    return not is_packed and (bool(value.uses()) or value.is_graph_output())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replaced_node_computes_the_other_operator_and_back(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model, nodes = case.model, _nodes(case.model)
    # What was not stated before may be stated afterwards.
    is_typed = random_graphs.is_typed(model)
    before = random_graphs.normal_form(model, infos=is_typed)
    index = rng.choice([i for i, node in enumerate(nodes) if node.op_type in ("Tanh", "Sigmoid", "Relu", "Neg", "Abs")])
    old, new = nodes[index].op_type, rng.choice(_UNARY)
    expected = random_graphs.compute(_edited(model, index, lambda node: setattr(node, "op_type", new)), case.feeds)
    replaced = replace_node(model, nodes[index], new)
    random_graphs.check(model)
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)
    replace_node(model, replaced, old)
    assert random_graphs.normal_form(model, infos=is_typed) == before


@pytest.mark.parametrize("seed", range(15))
def test_refused_edits_leave_no_trace(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model = case.model
    node = rng.choice([node for node in model.graph if node.outputs[0].uses() and node.inputs])
    reader = rng.choice([user for user, _ in node.outputs[0].uses()])
    late = str(reader.outputs[0].name) if reader.graph is model.graph else "d9_9"
    source = rng.choice([value for value in node.inputs if value is not None])
    data = ir.to_proto(model).SerializeToString()
    uses = {value: value.uses() for graph in all_graphs(model) for value in defined_values(graph)}
    refused: list[Callable[[], object]] = [
        # Cycles: the node would read what depends on it.
        lambda: replace_node(model, node, "Sum", inputs=[source, late]),
        lambda: insert_node(model, "Sum", before=node, inputs=[late]),
        # Dtypes and shapes.
        lambda: replace_node(model, node, "MatMul", inputs=[source, np.zeros((7, 7), bool)]),
        lambda: insert_node(model, "Add", after=source, inputs=[np.zeros((7, 7, 7), bool)]),
        # Names.
        lambda: remove_node(model, "no such node"),
        lambda: insert_node(model, "Relu6", after=source),
        lambda: insert_node(model, "Relu", after=source, attributes={"alpha": 1.0}),
        lambda: insert_node(model, "Relu", after=source, output="in_0"),
        lambda: insert_node(model, "Gelu", after=source),
        lambda: insert_node(model, "FusedGelu", after=source, domain="com.microsoft"),
        lambda: insert_node(model, "Relu"),
        lambda: remove_node(model, node, connect={str(node.outputs[0].name): "in_9"}),
    ]
    for number, call in enumerate(refused):
        with pytest.raises((GraphError, UsageError)):
            print(number, call())
        assert ir.to_proto(model).SerializeToString() == data
        assert {value: value.uses() for graph in all_graphs(model) for value in defined_values(graph)} == uses


def _model(text: str) -> ir.Model:
    head = '<ir_version: 10, opset_import: ["" : 18, "local" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(head + text))


def _wiring(model: ir.Model) -> list[tuple[str, str, str]]:
    nodes = [(node.op_type, node.inputs[0], node.outputs[0]) for node in model.graph]
    return [(op, str(read.name), str(made.name)) for op, read, made in nodes if read is not None]


def test_between_input_and_output_an_identity_keeps_both_names(random_graphs: ModuleType) -> None:
    model = _model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    assert remove_node(model, "y") == 1
    assert _wiring(model) == [("Identity", "x", "y")]
    random_graphs.check(model)


def test_the_maker_of_the_input_takes_the_output_over(random_graphs: ModuleType) -> None:
    model = _model("g (float[N] x) => (float[N] y, float[N] z) { a = Neg(x)\n y = Relu(a)\n z = Abs(a) }")
    remove_node(model, "y")
    assert _wiring(model) == [("Neg", "x", "y"), ("Abs", "y", "z")]
    remove_node(model, "z")
    assert [node.op_type for node in model.graph] == ["Neg", "Identity"]
    random_graphs.check(model)


def test_a_captured_output_is_connected_inside_the_subgraph(random_graphs: ModuleType) -> None:
    model = _model(
        "g (float[N] x, bool c) => (float[N] y) { a = Relu(x)\n y = If (c) <then_branch = t () => (float[N] b)"
        " { b = Neg(a) }, else_branch = e () => (float[N] d) { d = Abs(a) }> }"
    )
    assert remove_node(model, "a") == 2
    random_graphs.check(model)
    got = random_graphs.compute(model, [{"x": np.array([-1.0, 2.0], np.float32), "c": np.array(True)}])
    assert got[0]["y"].tolist() == [1.0, -2.0]
    # What a branch returns cannot be an outer tensor itself.
    remove_node(model, "b")
    random_graphs.check(model)
    assert random_graphs.compute(model, [{"x": np.array([-1.0], np.float32), "c": np.array(True)}])[0]["y"] == [-1.0]


def test_a_pad_after_a_convolution_changes_the_shapes_behind_it(random_graphs: ModuleType) -> None:
    weight = "float[2,3,3,3] w = {" + ",".join(["1"] * 54) + "}"
    model = _model(f"g (float[N,3,8,8] x) => (float[N,2,6,6] y) <{weight}> {{ c = Conv(x, w)\n y = Relu(c) }}")
    pad = insert_node(model, "Pad", after="c", inputs=[np.array([0, 0, 1, 1, 0, 0, 1, 1])])
    assert str(model.graph.outputs[0].shape) == "[N,2,8,8]"
    random_graphs.check(model)
    got = random_graphs.compute(model, [{"x": np.ones((1, 3, 8, 8), np.float32)}])[0]["y"]
    assert got.shape == (1, 2, 8, 8)
    assert got.sum() == 27 * 2 * 36
    remove_node(model, pad)
    assert list(model.graph.initializers) == ["w"]
    assert str(model.graph.outputs[0].shape) == "[N,2,6,6]"


def test_a_node_that_reads_what_is_made_later_moves_behind_it(random_graphs: ModuleType) -> None:
    model = _model("g (float[N] x) => (float[N] y, float[N] z) { a = Neg(x)\n y = Relu(a)\n b = Exp(x)\n z = Abs(b) }")
    insert_node(model, "Add", after="a", inputs=["z"])
    random_graphs.check(model)
    assert [node.op_type for node in model.graph].index("Add") > 2
    got = random_graphs.compute(model, [{"x": np.zeros(1, np.float32)}])
    assert got[0]["y"].tolist() == [1.0]


def test_inside_a_function_only_its_calls_change(random_graphs: ModuleType) -> None:
    model = next(
        m
        for m in (random_graphs.random_model(seed).model for seed in SEEDS)
        if any(n.op_type == "Blend" for n in m.graph)
    )
    data = ir.to_proto(model).SerializeToString()
    with pytest.raises(GraphError, match="did you mean 'd0_2'"):
        remove_node(model, "d0_22", function="Blend")
    assert ir.to_proto(model).SerializeToString() == data
    node = insert_node(model, "Add", after="d0_2", inputs=["d0_2"], function="local:Blend")
    assert node.graph is next(iter(model.functions.values())).graph
