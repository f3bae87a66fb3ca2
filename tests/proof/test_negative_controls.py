"""Faults that an export can have; each must fail the verification, and the unchanged part must pass it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm_export.bundle.loss import Loss, LossRecord, Samples
from vlm_export.bundle.manifest import VariantRecord
from vlm_export.errors import InputError, VerificationError
from vlm_export.exporting.parts import add_preprocessing
from vlm_export.family import Model, Part, reference_from_module
from vlm_export.models.layers.from_uint8 import PreprocessedVision
from vlm_export.proof import image_samples
from vlm_export.proof.gates import GATES, Gate, variant_gate
from vlm_export.proof.grid import grid_for
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays, EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.proof.samples import sample_inputs
from vlm_export.proof.verifier import verify_part
from vlm_export.quantizing.budget import DEFAULT_BUDGETS
from vlm_export.specs import ImageSpec

Mutate = Callable[[str, Callable[[nn.Module], None]], Part]


def swap_query_and_key(module: nn.Module) -> None:
    qkv = module.get_submodule("blocks.0.attn.qkv")
    for tensor in (qkv.weight, qkv.bias):
        assert isinstance(tensor, nn.Parameter)
        query, key, value = tensor.chunk(3)
        tensor.copy_(torch.cat([key, query, value]))


def zero_layer(module: nn.Module) -> None:
    for parameter in module.get_submodule("blocks.0.mlp.fc1").parameters():
        parameter.zero_()


def scale_output(module: nn.Module) -> None:
    module.get_parameter("projection").mul_(1.5)


def poison_output(module: nn.Module) -> None:
    module.get_parameter("projection")[0, 0] = float("nan")


def overflow(module: nn.Module) -> None:
    module.get_parameter("projection")[0, 0] = float("inf")


def load_another_model(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        # The same mean and deviation: nothing but the weights themselves tells the models apart.
        deviation, mean = parameter.std(correction=0), parameter.mean()
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation + mean)


def use_erf_gelu(module: nn.Module) -> None:
    module.get_submodule("blocks.0.mlp").act = nn.GELU()


def lose_causal_mask(module: nn.Module) -> None:
    module.get_buffer("causal_mask").zero_()


def shift_positions(module: nn.Module) -> None:
    table = module.get_parameter("position_embedding")
    table.copy_(table.roll(1, 0))


def change_first_token(module: nn.Module) -> None:
    """Seen in texts alone: the padding of OpenAI's texts has the same id, but nothing reads it."""
    module.get_parameter("token_embedding.weight")[0].neg_()


def change_start_token(module: nn.Module) -> None:
    module.get_parameter("token_embedding.weight")[-2].neg_()


def change_last_token(module: nn.Module) -> None:
    module.get_parameter("token_embedding.weight")[-1].neg_()


MODULE_FAULTS = [
    *[(part, fault) for part in ("vision", "text") for fault in (swap_query_and_key, zero_layer, scale_output)],
    *[(part, fault) for part in ("vision", "text") for fault in (poison_output, overflow, load_another_model)],
    *[(part, fault) for part in ("vision", "text") for fault in (use_erf_gelu, shift_positions)],
    ("text", lose_causal_mask),
    *[("text", fault) for fault in (change_first_token, change_start_token, change_last_token)],
]


def quantised(budget: Mapping[str, float], precision: str = "int4") -> VariantRecord:
    """A variant that was published within a budget."""
    measured = Loss({}, {}, None, None, None, 0.2)
    loss = LossRecord("", False, measured, None, "not run", budget, Samples(0, 0, 0, 0, 0, 0, 0, 0))
    return VariantRecord(precision, f"onnx/vision_model_{precision}.onnx", loss=loss)


def gate_of(name: str) -> Gate:
    """A precision's own gate, or the laxest of those that are quantised."""
    return (
        GATES[name] if name in GATES else variant_gate("vision", quantised({"cosine": DEFAULT_BUDGETS[name]["cosine"]}))
    )


def verify(part: Part, engine: EngineRun, gate: str = "fp32") -> PartReport:
    """The unchanged part's module is the Reference."""
    grid = grid_for(part.signature)
    return verify_part(part, reference_from_module(part), engine, gate_of(gate), grid, pad_token_id=0)


def test_a_quantised_variant_is_held_to_the_budget_that_it_states() -> None:
    assert variant_gate("vision", quantised({"cosine": 0.97})).cosine == 0.97
    for variant in (quantised({"top10": 0.9}), VariantRecord("int4", "onnx/vision_model_q4.onnx")):
        with pytest.raises(InputError, match="states no budget for the variant 'int4'"):
            variant_gate("vision", variant)
    # What the project judges by its own limits gets no looser ones.
    assert variant_gate("vision", quantised({"cosine": 0.1}, "fp32")) == GATES["fp32"]


@pytest.mark.parametrize("gate", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("name", ["vision", "text"])
def test_the_unchanged_part_passes(parts: dict[str, Part], name: str, gate: str) -> None:
    report = verify(parts[name], reference_from_module(parts[name]), gate)
    assert report.passed, report.failures
    report.raise_if_failed()


@pytest.mark.parametrize(("name", "fault"), MODULE_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_in_the_module_fails(
    parts: dict[str, Part], mutated: Mutate, name: str, fault: Callable[[nn.Module], None]
) -> None:
    report = verify(parts[name], reference_from_module(mutated(name, fault)))
    assert not report.passed
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert caught.value.exit_status == 1
    assert f"output {name if name == 'text' else 'image'}_embeds" in caught.value.where


@pytest.mark.parametrize("gate", ["fp16", "int4"])
@pytest.mark.parametrize("fault", [scale_output, poison_output, overflow, load_another_model])
@pytest.mark.parametrize("name", ["vision", "text"])
def test_no_gate_lets_a_gross_fault_pass(
    parts: dict[str, Part], mutated: Mutate, name: str, fault: Callable[[nn.Module], None], gate: str
) -> None:
    assert not verify(parts[name], reference_from_module(mutated(name, fault)), gate).passed


def test_a_lost_mask_also_breaks_the_padding_check(parts: dict[str, Part], mutated: Mutate) -> None:
    report = verify(parts["text"], reference_from_module(mutated("text", lose_causal_mask)))
    assert "padding" in {point.kind for point, _ in report.failures}


# Faults of graphs, as wrappers around the right module.


def one_row_of_the_batch(run: EngineRun) -> EngineRun:
    return lambda inputs: {name: array[:1] for name, array in run(inputs).items()}


def first_row_for_all(run: EngineRun) -> EngineRun:
    return lambda inputs: {name: np.repeat(array[:1], len(array), axis=0) for name, array in run(inputs).items()}


def reversed_rows(run: EngineRun) -> EngineRun:
    return lambda inputs: {name: array[::-1] for name, array in run(inputs).items()}


def static_batch(run: EngineRun) -> EngineRun:
    def engine(inputs: Arrays) -> Arrays:
        if any(len(array) != 2 for array in inputs.values()):
            raise RuntimeError("Got invalid dimensions for input: index 0 Got: 3 Expected: 2")
        return dict(run(inputs))

    return engine


def half_precision_output(run: EngineRun) -> EngineRun:
    return lambda inputs: {name: array.astype(np.float16) for name, array in run(inputs).items()}


def renamed_output(run: EngineRun) -> EngineRun:
    return lambda inputs: {f"{name}_1": array for name, array in run(inputs).items()}


def lost_axis(run: EngineRun) -> EngineRun:
    return lambda inputs: {name: array[..., None] for name, array in run(inputs).items()}


GRAPH_FAULTS = [one_row_of_the_batch, first_row_for_all, reversed_rows, static_batch, half_precision_output]
GRAPH_FAULTS += [renamed_output, lost_axis]


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_fault_in_the_graph_fails(parts: dict[str, Part], name: str, fault: Callable[[EngineRun], EngineRun]) -> None:
    engine = fault(reference_from_module(parts[name]))
    assert not verify(parts[name], engine).passed


def test_a_sequence_axis_fixed_by_the_trace_fails(parts: dict[str, Part]) -> None:
    run = reference_from_module(parts["text"])

    def engine(inputs: Arrays) -> Arrays:
        ids = inputs["input_ids"][:, :7]
        return run({"input_ids": np.pad(ids, ((0, 0), (0, 7 - ids.shape[1])))})

    assert not verify(parts["text"], engine).passed


def test_an_integer_argument_that_vanished_fails(parts: dict[str, Part]) -> None:
    # The end-of-text position of the tracing example became a constant of the graph.
    part = parts["text"]
    module = part.module
    traced = part.examples({"batch": 2, "sequence": 7}, 0)["input_ids"].argmax(1)

    class FrozenPosition(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            end = min(int(traced[0]), input_ids.shape[1] - 1)
            kept = input_ids.clamp(max=198)
            kept[:, end] = 199
            frozen: torch.Tensor = module(kept)
            return frozen

    frozen = FrozenPosition()
    assert not verify(part, lambda i: {"text_embeds": frozen(torch.from_numpy(i["input_ids"])).numpy()}).passed


def resize_without_antialias(image: Image.Image, spec: ImageSpec) -> Array:
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None] / 255
    scale = spec.size_pixels / min(image.size)
    size = (max(spec.size_pixels, int(image.height * scale)), max(spec.size_pixels, int(image.width * scale)))
    resized = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=False)[0].clamp(0, 1)
    top, left = (size[0] - spec.size_pixels) // 2, (size[1] - spec.size_pixels) // 2
    cropped = resized[:, top : top + spec.size_pixels, left : left + spec.size_pixels].numpy()
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    return np.asarray((cropped - mean) / std)


# Two libraries' preparations, which differ in nothing but the crop where an image is RGB.
TRANSFORMERS: Mapping[str, Any] = {"crop": "down", "rgb_stage": "before_resize", "transparency": "white"}
TORCHVISION: Mapping[str, Any] = {"crop": "nearest_even", "rgb_stage": "after_crop", "transparency": "drop"}


@pytest.mark.parametrize("resize_pixels", [42, 44, 51])
@pytest.mark.parametrize(("right", "wrong"), [(TRANSFORMERS, TORCHVISION), (TORCHVISION, TRANSFORMERS)])
def test_the_other_rounding_of_the_crop_in_the_graph_fails(
    model: Model, right: Mapping[str, Any], wrong: Mapping[str, Any], resize_pixels: int
) -> None:
    assert isinstance(model.image, ImageSpec)
    spec = replace(model.image, resize_pixels=(resize_pixels,), **right)
    whole = add_preprocessing(replace(model, image=spec))
    part, reference = whole.parts[-1], whole.references["vision_from_uint8"]()
    samples = sample_inputs(part.signature, spec, None, None)
    run = reference_from_module(part)
    assert verify_part(part, reference, run, GATES["preprocessing"], (), samples).passed
    vision = part.module.get_submodule("vision")
    other = reference_from_module(replace(part, module=PreprocessedVision(replace(spec, **wrong), vision)))
    assert verify_part(part, reference, other, GATES["preprocessing"], (), samples).failures
    # The record of a published bundle holds the first sample.
    assert verify_part(part, reference, other, GATES["preprocessing"], (), samples[:1]).failures


@pytest.mark.parametrize("gate", ["fp32", "fp16"])
def test_preprocessing_without_antialias_fails(
    model: Model, parts: dict[str, Part], monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    part = parts["vision"]
    run = reference_from_module(part)
    right = sample_inputs(part.signature, model.image, model.text, None)
    assert verify_part(part, run, run, GATES[gate], (), right).passed
    monkeypatch.setattr(image_samples, "preprocess_image", resize_without_antialias)
    wrong = sample_inputs(part.signature, model.image, model.text, None)
    report = verify_part(part, run, run, GATES[gate], (), wrong)
    assert len(report.failures) >= len(wrong)
