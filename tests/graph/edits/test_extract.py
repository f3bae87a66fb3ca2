"""Parts of random models, against the tensors that the whole model computes; models split and put together again."""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.edits.compose import compose
from vlm_export.graph.edits.extract import Split, extract, split
from vlm_export.graph.edits.io_edits import add_output

SEEDS = range(40)


def _made(model: ir.Model) -> list[str]:
    """Tensors of the main graph that nodes make, in order."""
    return [str(value.name) for node in model.graph for value in node.outputs if value.name]


def _tapped(random_graphs: ModuleType, model: ir.Model, names: Sequence[str], feeds: Any) -> list[dict[str, Any]]:
    """What the whole model computes for these tensors."""
    tapped = model.clone()
    taps = [name for name in names if name not in {value.name for value in tapped.graph.outputs}]
    if taps:
        add_output(tapped, taps)
    return [{name: out[name] for name in names} for out in random_graphs.compute(tapped, feeds)]


def _extract_with_what_it_needs(model: ir.Model, starts: list[str], ends: list[str]) -> ir.Model:
    """Adds inputs that the refusal names, and leaves out those that it calls unused."""
    for _ in range(3):
        try:
            return extract(model, starts, ends)
        except GraphError as error:
            if error.what == "the outputs do not depend on these inputs":
                starts = [name for name in starts if name not in ast.literal_eval(error.got)]
            else:
                starts = starts + ast.literal_eval(error.got.removeprefix("also needed: "))
    return extract(model, starts, ends)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_computes_what_the_whole_computes(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    model, made = case.model, _made(case.model)
    data = ir.to_proto(model).SerializeToString()
    ends = rng.sample(made[len(made) // 2 :], 2)
    starts = rng.sample(made[: len(made) // 2], 2)
    known = _tapped(random_graphs, model, list(dict.fromkeys([*starts, *ends])), case.feeds)
    part = _extract_with_what_it_needs(model, starts, ends)
    assert ir.to_proto(model).SerializeToString() == data
    random_graphs.check(part)
    assert [value.name for value in part.graph.outputs] == ends
    feeds = [{**feed, **{name: out[name] for name in starts}} for feed, out in zip(case.feeds, known, strict=True)]
    expected = [{name: out[name] for name in ends} for out in known]
    assert random_graphs.same(random_graphs.compute(part, feeds), expected)
    # All that is left is needed, and what was known of it still is.
    assert all(value.uses() or value.is_graph_output() for value in part.graph.initializers.values())
    assert part.opset_imports == model.opset_imports
    infos = {value.name: (value.type, str(value.shape)) for node in model.graph for value in node.outputs if value.type}
    kept = {value.name: (value.type, str(value.shape)) for node in part.graph for value in node.outputs if value.type}
    assert all(infos[name] == info for name, info in kept.items() if name in infos and name not in ends)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_split_model_composes_back(random_graphs: ModuleType, seed: int) -> None:
    case, rng = random_graphs.random_model(seed), random.Random(seed)
    outputs = [str(value.name) for value in case.model.graph.outputs]
    model = extract(case.model, None, outputs)
    expected = random_graphs.compute(model, case.feeds)
    parts = _split_somewhere(model, rng)
    if parts is None:
        return
    for part in (parts.first, parts.second):
        random_graphs.check(part)
    firsts = random_graphs.compute(parts.first, case.feeds)
    feeds = [{**feed, **out} for feed, out in zip(case.feeds, firsts, strict=True)]
    seconds = random_graphs.compute(parts.second, feeds)
    both = [{name: {**one, **two}[name] for name in outputs} for one, two in zip(firsts, seconds, strict=True)]
    assert random_graphs.same(both, expected)
    whole = _composed(parts)
    random_graphs.check(whole)
    # Where no types were stated, those of the cut tensors are now.
    infos = random_graphs.is_typed(model)
    assert random_graphs.normal_form(whole, infos=infos) == random_graphs.normal_form(model, infos=infos)
    assert random_graphs.same(random_graphs.compute(whole, case.feeds), expected)


def _split_somewhere(model: ir.Model, rng: random.Random) -> Split | None:
    """Splits at a random tensor and at those that the refusal names; None where no tensor separates the outputs."""
    names = [rng.choice(_made(model))]
    for _ in range(20):
        try:
            return split(model, names)
        except GraphError as error:
            if "also reads" not in error.got:
                return None
            names = names + ast.literal_eval(error.got.removeprefix("what follows also reads "))
    raise AssertionError("splitting does not come to an end")


def _composed(parts: Split) -> ir.Model:
    return compose(
        parts.first,
        parts.second,
        parts.connections,
        shared_inputs=parts.shared_inputs,
        inputs=parts.inputs,
        outputs=parts.outputs,
    )


def test_most_random_models_can_be_split(random_graphs: ModuleType) -> None:
    found = 0
    for seed in SEEDS:
        model = random_graphs.random_model(seed).model
        model = extract(model, None, [str(value.name) for value in model.graph.outputs])
        found += _split_somewhere(model, random.Random(seed)) is not None
    assert found > len(SEEDS) // 2


def _parse(body: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{body}'))


def test_refusals_say_what_is_missing(random_graphs: ModuleType) -> None:
    model = random_graphs.random_model(3).model
    data = ir.to_proto(model).SerializeToString()
    output = str(model.graph.outputs[0].name)
    for inputs, outputs, message in (
        (None, ["d0_999"], "no tensor"),
        ([], [output], "need more inputs"),
        (None, [], "at least one output"),
        (None, [output, output], "named once"),
    ):
        with pytest.raises(GraphError, match=message):
            extract(model, inputs, outputs)
    with pytest.raises(GraphError, match="that its nodes make"):
        split(model, ["in_0"])
    assert ir.to_proto(model).SerializeToString() == data


def test_what_a_branch_captures_is_needed(random_graphs: ModuleType) -> None:
    model = _parse(
        "g (float[N] x, float[N] z, bool c) => (float[N] y) { a = Relu(x)\n b = Neg(z)\n"
        " y = If (c) <then_branch = t () => (float[N] p) { p = Add(a, b) },"
        " else_branch = e () => (float[N] q) { q = Identity(a) }> }"
    )
    with pytest.raises(GraphError, match="need more inputs") as caught:
        extract(model, ["a", "c"], ["y"])
    assert "['z']" in caught.value.got
    part = extract(model, ["a", "b", "c"], ["y"])
    assert [value.name for value in part.graph.inputs] == ["a", "b", "c"]
    assert [node.op_type for node in part.graph] == ["If"]
    random_graphs.check(part)


def test_a_cut_output_of_a_node_that_is_still_needed(random_graphs: ModuleType) -> None:
    model = _parse(
        "g (float[N,4] x) => (float[N,2] y) { a, b = Split <axis = 1, num_outputs = 2> (x)\n y = Add(a, b) }"
    )
    part = extract(model, ["a", "x"], ["y"])
    random_graphs.check(part)
    names = [value.name for value in part.graph[0].outputs]
    assert names == ["a_uncut", "b"]


def test_split_at_several_tensors(random_graphs: ModuleType) -> None:
    model = _parse(
        "g (float[N] x, float[N] z) => (float[N] early, float[N] y) { early = Exp(x)\n a = Relu(early)\n b = Neg(a)\n"
        " c = Abs(a)\n d = Add(b, c)\n y = Mul(d, z) }"
    )
    with pytest.raises(GraphError, match="do not separate") as caught:
        split(model, ["b"])
    assert "['a']" in caught.value.got
    parts = split(model, ["b", "c"])
    assert [value.name for value in parts.first.graph.outputs] == ["b", "c", "early"]
    assert [value.name for value in parts.second.graph.inputs] == ["b", "c", "z"]
    whole = _composed(parts)
    assert random_graphs.normal_form(whole, infos=False) == random_graphs.normal_form(model, infos=False)


def test_functions_that_nothing_calls_stay_behind(random_graphs: ModuleType) -> None:
    models = (random_graphs.random_model(seed).model for seed in SEEDS)
    model = next(m for m in models if any(node.op_type == "Blend" for node in m.graph))
    assert not extract(model, None, ["d0_0"]).functions
    blend = next(node for node in model.graph if node.op_type == "Blend")
    assert len(extract(model, None, [str(blend.outputs[0].name)]).functions) == 1
