"""BLIP in graphs of both back ends: the original's records, cached decoding, what each graph holds, and faults."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor, nn

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.exporting.backends import Exporter, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import Part, reference_from_module
from vlm_export.models.blip.family import BlipFamily
from vlm_export.models.layers.bert import BertLayer
from vlm_export.models.layers.blocks import KeyValueProjection
from vlm_export.proof.gates import GATES
from vlm_export.proof.grid import grid_for
from vlm_export.proof.points import EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.proof.verifier import verify_part
from vlm_export.runtime.engines.onnxruntime import OrtEngine

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "models" / "blip_oracle.py")))
Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Target = tuple[Exporter, int]
TARGETS: tuple[Target, ...] = (("dynamo", 18), ("torchscript", 11), ("torchscript", 17))
FAST: Target = ("torchscript", 17)
PARTS = {
    "caption": ("vision", "cross_key_values", "text_decoder"),
    "feature_extractor": ("vision", "text", "multimodal_text", "cross_key_values", "text_decoder"),
    "retrieval": ("vision", "text", "multimodal_text"),
    "vqa": ("vision", "vqa_encoder", "cross_key_values", "text_decoder"),
}
ALL_PARTS = [(variant, part) for variant, parts in PARTS.items() for part in parts]
by_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")


@dataclass(frozen=True)
class Graph:
    path: Path
    engine: OrtEngine

    def weights(self) -> dict[str, Array]:
        """Name → value of each initializer that is more than a shape or an index."""
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(self.path).graph.initializer}
        return {name: array for name, array in stored.items() if array.dtype == np.float32 and array.size > 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Part]]:
    """The Part of each variant and name."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        found: dict[tuple[str, str], Part] = {}
        for variant in PARTS:
            store = stack.enter_context(ScratchStore(tmp_path_factory.mktemp("store") / "weights.bin"))
            model = BlipFamily().build(open_checkpoint(str(oracle.checkpoint_path(variant))), store)
            found |= {(variant, part.name): part for part in model.parts}
        assert set(found) == set(ALL_PARTS)
        yield found


GraphOf = Callable[[str, str, Target], Graph]


@pytest.fixture(scope="module")
def graph_of(parts: dict[tuple[str, str], Part], tmp_path_factory: pytest.TempPathFactory) -> GraphOf:
    """The published form of a variant's part, exported once for each target."""
    folder, made = tmp_path_factory.mktemp("graphs"), dict[tuple[str, str, Target], Graph]()

    def make(variant: str, name: str, target: Target) -> Graph:
        if (variant, name, target) not in made:
            part, (exporter, opset) = parts[variant, name], target
            path = folder / f"{variant}-{name}-{exporter}-{opset}.onnx"
            write_graph(finish_graph(simplify_graph(export_part(part, opset, exporter)), part.signature), path)
            made[variant, name, target] = Graph(path, OrtEngine(path, threads=1))
        return made[variant, name, target]

    return make


def runner(graph_of: GraphOf, variant: str, target: Target) -> Callable[[str, Arrays], Arrays]:
    return lambda name, inputs: graph_of(variant, name, target).engine.run(inputs)


def assert_same(found: Array, expected: Array, what: str) -> None:
    assert found.shape == expected.shape, what
    difference, limit = float(np.abs(found - expected).max()), 1e-4 * float(np.abs(expected).max())
    assert difference <= limit, f"{what}: {difference:.1e}, limit {limit:.1e}"
    rows = [array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (found, expected)]
    norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    assert ((rows[0] * rows[1]).sum(axis=1) / norms).min() >= 0.99999, what


@by_target
@pytest.mark.parametrize("variant", PARTS)
def test_every_record(variant: str, target: Target, graph_of: GraphOf) -> None:
    record = oracle.read_record(variant)
    names = set()
    for name, found in oracle.outputs(variant, record, runner(graph_of, variant, target)):
        assert_same(found, record[name], name)
        names.add(name)
    recorded = {name for name in record if not name.startswith(("input", "output_resized.", "preprocess.image_png"))}
    assert names == recorded - set(oracle.BY_THE_RUNTIME)


@by_target
@pytest.mark.parametrize("variant", ["caption", "vqa"])
def test_cached_decoding_equals_the_teacher_forced_record(variant: str, target: Target, graph_of: GraphOf) -> None:
    record, run = oracle.read_record(variant), runner(graph_of, variant, target)
    ids, mask, inputs = oracle.decoder_case(variant, record, run)
    tokens = ids.shape[1]
    for chunks in ((1,) * tokens, (4, *[1] * (tokens - 4)), (2, tokens - 2)):
        logits = oracle.decode_in_chunks(run, ids, mask, inputs, chunks)
        assert_same(logits, record["output.logits_teacher_forced"], f"logits in chunks of {chunks}")


@by_target
@pytest.mark.parametrize(("variant", "name"), ALL_PARTS)
def test_every_part_passes_the_grid(
    variant: str, name: str, target: Target, graph_of: GraphOf, parts: dict[tuple[str, str], Part]
) -> None:
    report = verified(parts[variant, name], graph_of(variant, name, target).engine.run)
    assert report.passed, report.failures


def verified(part: Part, engine: EngineRun) -> PartReport:
    return verify_part(
        part, reference_from_module(part), engine, GATES["fp32"], grid_for(part.signature), pad_token_id=0
    )


# What each graph holds.


def contents(weights: Mapping[str, Array]) -> set[bytes]:
    """Every matrix of more than a row or column, in both orientations."""
    matrices = [array for array in weights.values() if array.ndim == 2 and min(array.shape) > 2]
    return {np.ascontiguousarray(m).tobytes() for array in matrices for m in (array, array.T)}


def numpy_weights(modules: Mapping[str, nn.Module]) -> dict[str, Array]:
    return {
        f"{name}.{key}": value.numpy() for name, module in modules.items() for key, value in module.state_dict().items()
    }


@by_target
@pytest.mark.parametrize("variant", ["feature_extractor", "retrieval"])
def test_the_text_graph_holds_no_cross_attention(
    variant: str, target: Target, graph_of: GraphOf, parts: dict[tuple[str, str], Part]
) -> None:
    encoder = parts[variant, "multimodal_text"].module.get_submodule("encoder")
    cross = {name: encoder.get_submodule(name) for name in ("cross", "keys_values")}
    attending = contents(numpy_weights(cross))
    # Queries, outputs, keys and values, of each layer, in both orientations.
    assert len(attending) == 2 * 4 * len(cross["cross"].state_dict()) // 6
    text, multimodal = (graph_of(variant, name, target).weights() for name in ("text", "multimodal_text"))
    assert not [name for name in text if "cross" in name or "keys_values" in name]
    assert not attending & contents(text)
    # Each matrix is there in one orientation or the other.
    assert len(attending & contents(multimodal)) == len(attending)
    expected = sum(parameter.numel() for parameter in parts[variant, "text"].module.parameters())
    assert sum(array.size for array in text.values()) == pytest.approx(expected, rel=0.01)


@by_target
@pytest.mark.parametrize("variant", ["caption", "feature_extractor", "vqa"])
def test_no_weight_is_stored_twice_in_the_decoders_graphs(
    variant: str, target: Target, graph_of: GraphOf, parts: dict[tuple[str, str], Part]
) -> None:
    once, steps = (graph_of(variant, name, target).weights() for name in ("cross_key_values", "text_decoder"))
    assert contents(once)
    assert not contents(once) & contents(steps)
    words = parts[variant, "text_decoder"].module.get_parameter("embeddings.word.weight")
    shapes = [array.shape for array in steps.values()]
    assert sum(shape in (tuple(words.shape), tuple(words.T.shape)) for shape in shapes) == 1
    for name, weights in (("cross_key_values", once), ("text_decoder", steps)):
        expected = sum(parameter.numel() for parameter in parts[variant, name].module.parameters())
        assert sum(array.size for array in weights.values()) == pytest.approx(expected, rel=0.01)


@by_target
def test_the_image_tokens_keys_are_not_computed_at_a_step(target: Target, graph_of: GraphOf) -> None:
    names = {port.name for port in graph_of("caption", "text_decoder", target).engine.inputs}
    assert "encoder_hidden_states" not in names
    assert "past_key_values.0.encoder.key" in names


# Faults, each caught by the verification's grid.


def with_input(name: str, change: Callable[[Array], Array]) -> Callable[[EngineRun], EngineRun]:
    return lambda run: lambda inputs: run({**inputs, name: change(inputs[name])})


def all_ones(mask: Array) -> Array:
    return np.ones_like(mask)


def starting_with_cls(ids: Array) -> Array:
    """What is left of [ENC] or [DEC] when an export loses the write into the ids."""
    rows: Array = oracle.starting_with(ids, 101)
    return rows


GRAPH_FAULTS = [
    *[("retrieval", part, with_input("input_ids", starting_with_cls)) for part in ("text", "multimodal_text")],
    ("vqa", "vqa_encoder", with_input("input_ids", starting_with_cls)),
    ("caption", "text_decoder", with_input("input_ids", starting_with_cls)),
    *[("retrieval", part, with_input("attention_mask", all_ones)) for part in ("text", "multimodal_text")],
    ("vqa", "vqa_encoder", with_input("attention_mask", all_ones)),
    ("vqa", "text_decoder", with_input("attention_mask", all_ones)),
    ("vqa", "text_decoder", with_input("encoder_attention_mask", all_ones)),
    *[
        ("caption", "text_decoder", with_input(f"past_key_values.0.{name}", change))
        for name, change in (
            ("decoder.key", np.zeros_like),
            ("decoder.value", np.zeros_like),
            ("encoder.key", lambda cache: np.roll(cache, 1, axis=2)),
            ("encoder.value", lambda cache: cache[::-1]),
        )
    ],
]


@pytest.mark.parametrize(("variant", "name", "fault"), GRAPH_FAULTS)
def test_a_fault_of_a_graph_fails_the_grid(
    variant: str,
    name: str,
    fault: Callable[[EngineRun], EngineRun],
    graph_of: GraphOf,
    parts: dict[tuple[str, str], Part],
) -> None:
    report = verified(parts[variant, name], fault(graph_of(variant, name, FAST).engine.run))
    assert not report.passed


def drop_cross_attention(module: nn.Module) -> None:
    (layers,) = [child for name, child in module.named_modules() if name.endswith("cross")]
    for cross in layers.children():
        cross.register_forward_hook(lambda _, inputs, output: inputs[0])


def swap_keys_and_values(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, KeyValueProjection):
            child.register_forward_hook(lambda _, inputs, output: output[::-1])


def ignore_the_position_offset(module: nn.Module) -> None:
    def forward_without_past(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[:1]

    module.get_submodule("embeddings").register_forward_pre_hook(forward_without_past)


def lose_the_causal_mask(module: nn.Module) -> None:
    for layer in module.get_submodule("layers").children():
        assert isinstance(layer, BertLayer)
        attend = layer.attend_cached
        # The last new token sees what all may see: its row of the mask for each of them.
        layer.attend_cached = partial(_with_the_last_row, attend)  # type: ignore[method-assign]  # The fault.


def _with_the_last_row(attend: Callable[..., Any], x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]) -> Any:
    return attend(x, mask[:, :, -1:].expand_as(mask), past)


def untie_the_output(module: nn.Module) -> None:
    """The output matrix of another token order."""
    head = module.get_submodule("head")
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].roll(1, 0)))


MODULE_FAULTS = [
    ("retrieval", "multimodal_text", drop_cross_attention),
    ("vqa", "vqa_encoder", drop_cross_attention),
    ("caption", "text_decoder", drop_cross_attention),
    ("feature_extractor", "multimodal_text", swap_keys_and_values),
    ("caption", "cross_key_values", swap_keys_and_values),
    ("caption", "text_decoder", ignore_the_position_offset),
    ("vqa", "text_decoder", ignore_the_position_offset),
    ("caption", "text_decoder", lose_the_causal_mask),
    ("caption", "text_decoder", untie_the_output),
]


@pytest.mark.parametrize(("variant", "name", "fault"), MODULE_FAULTS)
def test_a_fault_of_a_module_fails_the_grid(
    variant: str, name: str, fault: Callable[[nn.Module], None], parts: dict[tuple[str, str], Part]
) -> None:
    part = parts[variant, name]
    module = copy.deepcopy(part.module)
    assert verified(part, reference_from_module(replace(part, module=module))).passed
    fault(module)
    assert not verified(part, reference_from_module(replace(part, module=module))).passed
