"""Graphs of nanoVLM's Parts against what the original computed; each known way to get one wrong must be noticed."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from vlm_export.exporting.backends import Exporter, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import Model, Part, reference_from_module
from vlm_export.models.layers import rotary_decoder
from vlm_export.models.layers.blocks import HIDDEN
from vlm_export.models.nanovlm import parts as nanovlm_parts
from vlm_export.proof.gates import GATES, judge
from vlm_export.proof.grid import grid_for
from vlm_export.proof.metrics import compare
from vlm_export.proof.points import EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.proof.verifier import verify_part
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.specs.signature import Axis

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "models" / "nanovlm_oracle.py")))
Array = npt.NDArray[Any]
Build = Callable[[str], Model]
Graphs = Callable[[str, Exporter, int, bool], dict[str, OrtEngine]]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
FORMS: list[tuple[Exporter, int, bool]] = [
    ("torchscript", 11, True),
    ("torchscript", 17, True),
    ("torchscript", 17, False),
    ("dynamo", 18, True),
    ("dynamo", 18, False),
]


@pytest.fixture(scope="module")
def build(models_under: Callable[[Path], Build]) -> Build:
    return models_under(oracle.DATA)


@pytest.fixture(scope="module")
def graphs(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Every Part of a variant as a graph, simplified and as the back end wrote it, opened; each exported once."""
    found: dict[tuple[str, Exporter, int], tuple[dict[str, OrtEngine], dict[str, OrtEngine]]] = {}

    def get(variant: str, exporter: Exporter, opset: int, simplified: bool) -> dict[str, OrtEngine]:
        key = (variant, exporter, opset)
        if key not in found:
            plain, simple = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("simplified")
            found[key] = {}, {}
            for part in build(variant).parts:
                raw = export_part(part, opset, exporter)
                found[key][1][part.name] = opened(simplify_graph(raw), part, simple)
                found[key][0][part.name] = opened(raw, part, plain)
        return found[key][simplified]

    return get


def write(part: Part, folder: Path, exporter: Exporter, opset: int) -> OrtEngine:
    return opened(simplify_graph(export_part(part, opset, exporter)), part, folder)


def opened(graph: ir.Model, part: Part, folder: Path) -> OrtEngine:
    path = folder / f"{part.name}.onnx"
    write_graph(finish_graph(graph, part.signature), path)
    return OrtEngine(path, threads=1, exact=True)


def verify(part: Part, run: EngineRun) -> PartReport:
    """By the grid, of short rows: long ones take the tiny models long, and show the same."""
    grid = grid_for(replace(part.signature, axes=tuple(map(_shortened, part.signature.axes))))
    return verify_part(part, reference_from_module(part), run, GATES["fp32"], grid)


def _shortened(axis: Axis) -> Axis:
    return axis if axis.maximum is None else replace(axis, maximum=min(axis.maximum, 40))


def failures(model: Model, runs: Mapping[str, Run], variant: str, parts: Iterable[str]) -> list[str]:
    """The records that these runs of some Parts miss."""
    missed = []
    for case in oracle.cases(model, variant):
        if case.part in parts:
            found = runs[case.part](case.inputs)[case.output]
            if judge(compare(case.expected, found), GATES["fp32"]):
                missed.append(case.record)
    return missed


@pytest.mark.parametrize(("exporter", "opset", "simplified"), FORMS)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_graphs(variant: str, exporter: Exporter, opset: int, simplified: bool, build: Build, graphs: Graphs) -> None:
    model, engines = build(variant), graphs(variant, exporter, opset, simplified)
    runs = {name: engine.run for name, engine in engines.items()}
    assert not failures(model, runs, variant, runs)
    expected = oracle.golden(variant)["output.generated_ids_greedy"]
    prompt = oracle.record_prompt(model, runs, variant)
    for cached in (True, False):
        np.testing.assert_array_equal(oracle.generate(model, runs, [prompt], 12, cached=cached), expected)
    if opset > 11:
        for part in model.parts:
            report = verify(part, engines[part.name].run)
            assert report.passed, report.first_failure()


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 18)])
@pytest.mark.parametrize("variant", ["450m", "split"])
def test_the_recorded_step(variant: str, exporter: Exporter, opset: int, build: Build, graphs: Graphs) -> None:
    model, records = build(variant), oracle.golden(variant)
    runs = {name: engine.run for name, engine in graphs(variant, exporter, opset, True).items()}
    inputs = oracle.decoder_inputs(model, list(records["output.combined_embeds"]))
    embeds = runs["embed_tokens"]({"input_ids": records["output.step_token"]})["inputs_embeds"]
    stepped = runs["decoder"](oracle.next_inputs(inputs, runs["decoder"](inputs), embeds))["logits"][:, 0]
    assert not judge(compare(records["output.step_logits"], stepped), GATES["fp32"])


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 18)])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_rows_of_a_batch_are_as_each_alone(
    variant: str, exporter: Exporter, opset: int, build: Build, graphs: Graphs
) -> None:
    """Three prompts of different lengths, padded on the left: logits of the prompt and every generated id."""
    model = build(variant)
    runs = {name: engine.run for name, engine in graphs(variant, exporter, opset, True).items()}
    prompt = oracle.record_prompt(model, runs, variant)
    longer = prompt._replace(ids=np.concatenate([prompt.ids, prompt.ids[-3:]]))
    shorter = prompt._replace(ids=prompt.ids[:-2])
    rows = [oracle.embedded(model, runs, row) for row in (prompt, longer, shorter)]
    together = runs["decoder"](oracle.decoder_inputs(model, rows))["logits"]
    for i, row in enumerate(rows):
        alone = runs["decoder"](oracle.decoder_inputs(model, [row]))["logits"]
        assert not judge(compare(alone, together[i : i + 1, -len(row) :]), GATES["fp32"])
    ids = oracle.generate(model, runs, [prompt, longer, shorter], 8)
    for i, one in enumerate((prompt, longer, shorter)):
        np.testing.assert_array_equal(ids[i : i + 1], oracle.generate(model, runs, [one], 8))


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 11), ("torchscript", 17), ("dynamo", 18)])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_the_last_logits_are_those_of_all(
    variant: str, exporter: Exporter, opset: int, build: Build, graphs: Graphs
) -> None:
    """As transformers.js counts them: 0 keeps all, and so does more than there are."""
    model = build(variant)
    run = graphs(variant, exporter, opset, True)["decoder"].run
    inputs = oracle.decoder_inputs(model, list(oracle.golden(variant)["output.combined_embeds"]))
    whole = run(inputs)
    tokens = whole["logits"].shape[1]
    for count in (1, 2, tokens - 1, tokens, tokens + 1, 10**9):
        some = run({**inputs, "num_logits_to_keep": np.array(count)})
        assert some["logits"].shape[1] == min(count, tokens)
        assert not judge(compare(whole["logits"][:, -count:], some["logits"]), GATES["fp32"])
        for name in set(whole) - {"logits"}:
            np.testing.assert_array_equal(some[name], whole[name])


def test_the_graph_holds_each_weight_once(build: Build, graphs: Graphs) -> None:
    """Also the tied matrix, as it is stored or transposed, and it repeats no key."""
    part = oracle.part_of(build("450m"), "decoder")
    forms: list[tuple[Exporter, int]] = [("torchscript", 17), ("dynamo", 18)]
    for exporter, opset in forms:
        graph = onnx.load(graphs("450m", exporter, opset, True)["decoder"].path).graph
        tables = [list(entry.dims) for entry in graph.initializer if 321 in entry.dims]
        assert tables in ([[321, 80]], [[80, 321]])
        held = sum(int(np.prod(entry.dims)) for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT)
        assert held < sum(tensor.numel() for tensor in part.module.state_dict().values()) + 100
        kinds = {node.op_type for node in graph.node}
        assert not kinds & {"Expand", "SplitToSequence", "SequenceAt", "If", "Loop"}
        assert sum(node.op_type == "Tile" for node in graph.node) <= 1  # of the mask


# Each known fault must be noticed, by the records and by the verification.
def without_causal_mask(attention_mask: Tensor, past_tokens: int, tokens: int, groups: int) -> Tensor:
    hidden = (1 - attention_mask).to(torch.float32)[:, None, None, :] * HIDDEN
    return hidden.expand(-1, 1, groups * tokens, -1)


def without_padding_mask(attention_mask: Tensor, past_tokens: int, tokens: int, groups: int) -> Tensor:
    return _mask(torch.ones_like(attention_mask), past_tokens, tokens, groups)


_mask = rotary_decoder.grouped_mask


def columns_first(tokens: Tensor, grid: int, factor: int) -> Tensor:
    channels, side = tokens.shape[2], grid // factor
    squares = tokens.reshape(-1, side, factor, side, factor, channels).permute(0, 1, 3, 4, 2, 5)
    return squares.reshape(-1, side * side, factor * factor * channels)


@contextmanager
def swapped_keys(part: Part) -> Iterator[Part]:
    changed = copy.deepcopy(part)
    attention: Any = changed.module.blocks[0].attn  # type: ignore[index, union-attr]  # a ModuleList of blocks
    weight = attention.qkv.weight
    rows = attention.kv_heads * attention.head_width
    first = weight.shape[0] - 2 * rows
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.cat([weight[:first], weight[first + rows :], weight[first : first + rows]]))
    yield changed


@contextmanager
def other_rope_base(part: Part) -> Iterator[Part]:
    changed = copy.deepcopy(part)
    frequencies: Any = changed.module.rotary.inv_freq  # type: ignore[union-attr]  # a buffer
    count = len(frequencies)
    frequencies.copy_(1 / 10000.0 ** (torch.arange(count) / count))
    yield changed


@contextmanager
def exact_gelu(part: Part) -> Iterator[Part]:
    changed = copy.deepcopy(part)
    for module in changed.module.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"
    yield changed


def patched(where: Any, name: str, fault: Any) -> Callable[[Part], Any]:
    @contextmanager
    def apply(part: Part) -> Iterator[Part]:
        with mock.patch.object(where, name, fault):
            yield part

    return apply


FAULTS: dict[str, tuple[str, Callable[[Part], Any]]] = {
    "swapped keys and values": ("decoder", swapped_keys),
    "another rope base": ("decoder", other_rope_base),
    "no causal mask": ("decoder", patched(rotary_decoder, "grouped_mask", without_causal_mask)),
    "channels of squares by column": ("vision_encoder", patched(nanovlm_parts, "shuffled", columns_first)),
    "exact GELU": ("vision_encoder", exact_gelu),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, build: Build, tmp_path: Path) -> None:
    name, make = FAULTS[fault]
    model, part = build("split"), oracle.part_of(build("split"), name)
    with make(part) as faulty:
        engine = write(faulty, tmp_path, "torchscript", 17)
    assert failures(model, {name: engine.run}, "split", [name])
    # In two layers the GELUs differ by about as much as the gate allows, and noise by less than the recorded image.
    assert fault == "exact GELU" or not verify(part, engine.run).passed


def test_ignored_padding_is_noticed(build: Build, tmp_path: Path) -> None:
    """No record has padding: the verification's own examples do."""
    part = oracle.part_of(build("split"), "decoder")
    with mock.patch.object(rotary_decoder, "grouped_mask", without_padding_mask):
        engine = write(part, tmp_path, "torchscript", 17)
    assert not verify(part, engine.run).passed
    inputs = part.examples(
        part.signature.related({"batch": 2, "sequence": 5, "past_sequence": 0, "logits_sequence": 5}), 1
    )
    unpadded = {**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])}
    right = reference_from_module(part)(unpadded)["logits"]
    assert not judge(compare(right, engine.run(unpadded)["logits"]), GATES["fp32"])
