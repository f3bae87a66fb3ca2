"""Names, outputs and order: on random models, with the inverse where there is one, and nothing changed on refusal."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import all_graphs, defined_values, nested_graphs
from vlm_export.graph.edits.io_edits import add_output, drop_output, rename_tensor, rename_tensors, reorder_interface

SEEDS = range(40)


def _all_values(model: ir.Model) -> list[ir.Value]:
    return [value for graph in all_graphs(model) for value in defined_values(graph)]


@pytest.mark.parametrize("seed", SEEDS)
def test_rename_reaches_every_use_and_back(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model = case.model
    before, expected = random_graphs.normal_form(model), random_graphs.compute(model, case.feeds)
    value = rng.choice(_all_values(model))
    old, is_input, is_output = str(value.name), value in model.graph.inputs, value in model.graph.outputs
    rename_tensor(model, value, "renamed/tensor:0")
    random_graphs.check(model)
    feeds = [
        {("renamed/tensor:0" if is_input and name == old else name): array for name, array in feed.items()}
        for feed in case.feeds
    ]
    renamed = [
        {("renamed/tensor:0" if is_output and name == old else name): array for name, array in outputs.items()}
        for outputs in expected
    ]
    assert random_graphs.same(random_graphs.compute(model, feeds), renamed)
    assert random_graphs.normal_form(model) != before
    rename_tensor(model, value, old)
    assert random_graphs.normal_form(model) == before


@pytest.mark.parametrize("seed", SEEDS)
def test_names_swap_and_taken_ones_are_refused(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model = case.model
    before, data = random_graphs.normal_form(model), ir.to_proto(model).SerializeToString()
    expected = random_graphs.compute(model, case.feeds)
    made = [value for node in model.graph for value in node.outputs if value.name and not value.is_graph_output()]
    one, two = rng.sample(made, 2)
    names = {str(one.name): str(two.name), str(two.name): str(one.name)}
    nested = [value for graph in nested_graphs(model.graph) for value in defined_values(graph)]
    with pytest.raises(GraphError, match="already named"):
        rename_tensor(model, one, str(rng.choice([value for value in nested if value is not one]).name))
    assert ir.to_proto(model).SerializeToString() == data
    assert rename_tensors(model, names) == 2
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)
    rename_tensors(model, names)
    assert random_graphs.normal_form(model) == before


@pytest.mark.parametrize("seed", SEEDS)
def test_taps_show_what_the_graph_computes_and_go_again(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model = case.model
    before, expected = random_graphs.normal_form(model, infos=False), random_graphs.compute(model, case.feeds)
    values = [value for value in defined_values(model.graph) if value.uses() and not value.is_graph_output()]
    taps = rng.sample(values, min(3, len(values)))
    assert add_output(model, [str(value.name) for value in taps]) == len(taps)
    random_graphs.check(model)
    computed = random_graphs.compute(model, case.feeds)
    names = list(expected[0])
    assert random_graphs.same([{name: outputs[name] for name in names} for outputs in computed], expected)
    for feed, outputs in zip(case.feeds, computed, strict=True):
        for value in taps:
            if value.name in feed and value.is_graph_input():
                assert outputs[value.name].tobytes() == feed[value.name].tobytes()
    assert drop_output(model, [str(value.name) for value in taps]) == 0
    # What is left is at most that the types of the taps are known now.
    assert random_graphs.normal_form(model, infos=False) == before
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dropped_output_takes_its_nodes_along(random_graphs: ModuleType, seed: int) -> None:
    case = random_graphs.random_model(seed)
    model, expected = case.model, random_graphs.compute(case.model, case.feeds)
    names = [str(value.name) for value in model.graph.outputs]
    data = ir.to_proto(model).SerializeToString()
    with pytest.raises(GraphError, match="no output"):
        drop_output(model, names)
    assert ir.to_proto(model).SerializeToString() == data
    if len(names) == 1:
        return
    nodes = len(model.graph)
    removed = drop_output(model, names[0])
    assert len(model.graph) == nodes - removed
    random_graphs.check(model)
    kept = [{name: outputs[name] for name in names[1:]} for outputs in expected]
    assert random_graphs.same(random_graphs.compute(model, case.feeds), kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_order_changes_nothing_else(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model, expected = case.model, random_graphs.compute(case.model, case.feeds)
    before = random_graphs.normal_form(model)
    inputs = [str(value.name) for value in model.graph.inputs]
    outputs = [str(value.name) for value in model.graph.outputs]
    reorder_interface(model, inputs=rng.sample(inputs, len(inputs)), outputs=rng.sample(outputs, len(outputs)))
    assert random_graphs.same(random_graphs.compute(model, case.feeds), expected)
    with pytest.raises(GraphError, match="not one of all"):
        reorder_interface(model, inputs=inputs, outputs=[outputs[0]] * (len(outputs) + 1))
    reorder_interface(model, inputs=inputs, outputs=outputs)
    assert random_graphs.normal_form(model) == before


def test_refusals_name_what_is_near(random_graphs: ModuleType) -> None:
    model = random_graphs.random_model(0).model
    data = ir.to_proto(model).SerializeToString()
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: rename_tensor(model, "in_itn", "x"), "did you mean 'in_int'"),
        (lambda: rename_tensor(model, "in_int", ""), "needs a name"),
        (lambda: add_output(model, str(model.graph.outputs[0].name)), "output already"),
        (lambda: drop_output(model, "nothing"), "no output 'nothing'"),
        (lambda: reorder_interface(model, inputs=["flga"]), "did you mean 'flag'"),
    ]
    for call, text in refused:
        with pytest.raises(GraphError, match=text):
            call()
    assert ir.to_proto(model).SerializeToString() == data


def test_a_tensor_of_a_subgraph_cannot_be_tapped(random_graphs: ModuleType) -> None:
    models = (random_graphs.random_model(seed).model for seed in SEEDS)
    model = next(model for model in models if any(node.op_type == "If" for node in model.graph))
    branch = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    with pytest.raises(GraphError, match="inside a subgraph"):
        add_output(model, branch[0].outputs[0])
