"""What the verifier runs, how it reports, and that no fault turns into a pass or a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlm_export.errors import EnvironmentFailure, InputError, VerificationError
from vlm_export.family import Array, Part, reference_from_module
from vlm_export.proof.deviation import Deviation
from vlm_export.proof.floor import Floor, FloorJudge
from vlm_export.proof.gates import GATES
from vlm_export.proof.grid import GridPoint, grid_for
from vlm_export.proof.points import Arrays, EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.proof.table import format_table
from vlm_export.proof.verifier import verify_part
from vlm_export.specs.signature import Axis, Signature, TensorSpec

FP32 = GATES["fp32"]


def verify_points(part: Part, engine: EngineRun, *points: GridPoint, pad_token_id: int | None = None) -> PartReport:
    return verify_part(part, reference_from_module(part), engine, FP32, points, pad_token_id=pad_token_id)


def test_the_report_tells_what_was_tested(parts: dict[str, Part]) -> None:
    part = parts["text"]
    run = reference_from_module(part)
    steps: list[tuple[int, int]] = []
    report = verify_part(
        part,
        run,
        run,
        FP32,
        grid_for(part.signature),
        reference_name="unpatched eager module",
        engine_name="onnxruntime 9",
        pad_token_id=0,
        progress=lambda done, total: steps.append((done, total)),
    )
    total = len(report.points)
    assert steps == [(done, total) for done in range(1, total + 1)]
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is True
    assert (data["part"], data["variant"], data["gate"]["name"]) == ("text", "fp32", "fp32")
    assert data["axes"] == {"batch": [1, 2, 3, 5], "sequence": [1, 3, 11, 20]}
    assert data["seeds"] == [0, 1, 2]
    assert data["points"] == {"grid": total - 2, "rows_alone": 1, "padding": 1}
    assert (data["reference"], data["engine"]) == ("unpatched eager module", "onnxruntime 9")
    assert data["worst"]["text_embeds"]["cosine"] >= 0.99999
    assert data["failures"] == []


def test_no_points_is_no_pass(parts: dict[str, Part]) -> None:
    report = verify_points(parts["text"], reference_from_module(parts["text"]))
    assert not report.passed
    with pytest.raises(VerificationError, match="at no point"):
        report.raise_if_failed()


def test_the_error_names_output_sizes_and_numbers(parts: dict[str, Part]) -> None:
    part = parts["text"]
    run = reference_from_module(part)
    report = verify_points(
        part, lambda i: {k: v * 1.5 for k, v in run(i).items()}, GridPoint({"batch": 2, "sequence": 7}, 4)
    )
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    error = caught.value
    assert error.where == "output text_embeds, at grid batch=2 sequence=7 seed=4"
    assert "max-abs: expected at most" in error.got
    assert "norm ratio: expected 0.999 to 1.001, got 1.5 to 1.5" in error.got
    assert "part 'text' at fp32" in error.what


@pytest.mark.parametrize("error", [RuntimeError("boom"), InputError("the graph takes other inputs"), KeyError("x")])
def test_an_engine_that_raises_is_a_failure(parts: dict[str, Part], error: Exception) -> None:
    def engine(inputs: Arrays) -> Arrays:
        raise error

    report = verify_points(parts["vision"], engine, GridPoint({"batch": 1}, 0))
    assert type(error).__name__ in str(report.failures[0][1])
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert caught.value.where == "at grid batch=1 seed=0"


def test_a_reference_that_raises_is_a_failure(parts: dict[str, Part]) -> None:
    def reference(inputs: Arrays) -> dict[str, np.ndarray]:
        raise RuntimeError("boom")

    part = parts["vision"]
    report = verify_part(part, reference, reference_from_module(part), FP32, [GridPoint({"batch": 1}, 0)])
    assert "the reference failed: RuntimeError: boom" in str(report.failures[0][1])


@pytest.mark.parametrize("error", [MemoryError(), EnvironmentFailure("no such provider"), KeyboardInterrupt()])
def test_the_machine_s_own_faults_go_through(parts: dict[str, Part], error: BaseException) -> None:
    def engine(inputs: Arrays) -> Arrays:
        raise error

    with pytest.raises(type(error)):
        verify_points(parts["vision"], engine, GridPoint({"batch": 1}, 0))


def test_a_missing_output_and_a_reference_against_its_signature_fail(parts: dict[str, Part]) -> None:
    part = parts["vision"]
    run, points = reference_from_module(part), [GridPoint({"batch": 2}, 0)]
    missing = verify_points(part, lambda inputs: {}, *points)
    assert "the engine returned no such output, only nothing" in str(missing.failures[0][1])

    def flat(inputs: Arrays) -> dict[str, np.ndarray]:
        return {name: array.ravel() for name, array in run(inputs).items()}

    contradicting = verify_part(part, flat, flat, FP32, points)
    assert not contradicting.passed
    assert "the reference contradicts the signature" in str(contradicting.failures[0][1])


class KeptRows(nn.Module):
    """x (B, T) and a number K → the last K of each row, as a decoder gives the logits of its last tokens."""

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        return x[:, -count:] * 2


def kept_part() -> Part:
    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rows = np.random.default_rng(seed).standard_normal((sizes["batch"], sizes["sequence"]), dtype=np.float32)
        return {"count": np.array(sizes["kept"], np.int64), "x": rows}

    signature = Signature(
        (TensorSpec("x", "float32", ("batch", "sequence")), TensorSpec("count", "int64", ())),
        (TensorSpec("y", "float32", ("batch", "kept")),),
        (Axis("batch"), Axis("sequence", 1, 9), Axis("kept", 1, 9, at_most="sequence")),
    )
    return Part("kept", KeptRows(), signature, examples)


def test_a_number_that_all_rows_share_goes_to_each_of_them() -> None:
    part = kept_part()
    run, points = reference_from_module(part), [GridPoint({"batch": 3, "sequence": 5, "kept": 2}, 0)]
    report = verify_points(part, run, *points)
    assert report.passed
    assert report.to_json()["points"] == {"grid": 1, "rows_alone": 1}

    def by_rows(inputs: Arrays) -> Arrays:
        return {"y": run(inputs)["y"] * len(inputs["x"])}

    assert {point.kind for point, _ in verify_points(part, by_rows, *points).failures} == {"grid", "rows_alone"}


def test_an_output_with_an_axis_of_its_own_is_held_to_the_others_and_its_rank() -> None:
    part = kept_part()
    run, points = reference_from_module(part), [GridPoint({"batch": 3, "sequence": 5, "kept": 2}, 0)]
    for wrong in (lambda y: y[:2], lambda y: y.ravel(), lambda y: y[..., None], lambda y: y.astype(np.float64)):

        def bent(inputs: Arrays, wrong: Callable[[Array], Array] = wrong) -> dict[str, Array]:
            return {"y": wrong(run(inputs)["y"])}

        report = verify_part(part, bent, bent, FP32, points)
        assert "the reference contradicts the signature" in str(report.failures[0][1])


def test_rows_that_depend_on_the_size_of_their_batch_fail(parts: dict[str, Part]) -> None:
    run = reference_from_module(parts["vision"])

    def engine(inputs: Arrays) -> Arrays:
        outputs = run(inputs)
        return {name: array * 2 for name, array in outputs.items()} if len(inputs["pixel_values"]) == 1 else outputs

    # At the point itself all is right; only the rows alone show it.
    report = verify_points(parts["vision"], engine, GridPoint({"batch": 2}, 0))
    assert {point.kind for point, _ in report.failures} == {"rows_alone"}


def test_padding_that_leaks_fails(parts: dict[str, Part]) -> None:
    run = reference_from_module(parts["text"])

    def engine(inputs: Arrays) -> Arrays:
        outputs = run(inputs)
        return {name: array + 1 for name, array in outputs.items()} if inputs["input_ids"].shape[1] > 7 else outputs

    point = GridPoint({"batch": 2, "sequence": 7}, 0)
    assert verify_points(parts["text"], engine, point).passed
    report = verify_points(parts["text"], engine, point, pad_token_id=0)
    assert {result.kind for result, _ in report.failures} == {"padding"}


class MaskedMean(nn.Module):
    """Hidden states that see the mean of the unmasked ones, as an encoder with a mask has them, and their first row."""

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        self.leak = leak
        self.embedding = nn.Embedding(50, 8)

    def forward(self, ids: Tensor, mask: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        weights = mask.to(torch.float32).clamp(min=self.leak)[:, :, None]
        hidden = x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True) + states.mean(1, keepdim=True)
        return hidden[:, 0], hidden


def masked_part(module: nn.Module) -> Part:
    tokens = ("batch", "sequence")
    signature = Signature(
        inputs=(
            TensorSpec("input_ids", "int64", tokens),
            TensorSpec("attention_mask", "int64", tokens),
            TensorSpec("encoder_hidden_states", "float32", ("batch", 5, 8)),
        ),
        outputs=(
            TensorSpec("text_embeds", "float32", ("batch", 8)),
            TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 8)),
        ),
        axes=(Axis("batch"), Axis("sequence", 1, 12)),
    )

    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        shape = sizes["batch"], sizes["sequence"]
        lengths = rng.integers(1, sizes["sequence"] + 1, (sizes["batch"], 1))
        return {
            "input_ids": rng.integers(1, 50, shape),
            "attention_mask": (np.arange(sizes["sequence"]) < lengths).astype(np.int64),
            "encoder_hidden_states": rng.standard_normal((sizes["batch"], 5, 8), dtype=np.float32),
        }

    return Part("multimodal_text", module.eval(), signature, examples)


def test_masked_padding_is_checked_at_the_real_positions() -> None:
    torch.manual_seed(0)
    part, seen = masked_part(MaskedMean()), []
    run = reference_from_module(part)

    def engine(inputs: Arrays) -> Arrays:
        seen.append({name: array.shape for name, array in inputs.items()})
        return run(inputs)

    report = verify_points(part, engine, GridPoint({"batch": 2, "sequence": 7}, 0), pad_token_id=0)
    assert report.passed, report.first_failure()
    (padding,) = [point for point in report.points if point.kind == "padding"]
    assert padding.sizes == {"batch": 2, "sequence": 7}
    assert padding.comparisons["last_hidden_state"].reference_type == "float32 (2, 7, 8)"
    assert seen[-1] == {"input_ids": (2, 12), "attention_mask": (2, 12), "encoder_hidden_states": (2, 5, 8)}


def test_a_mask_that_lets_padding_through_fails() -> None:
    torch.manual_seed(0)
    part = masked_part(MaskedMean(leak=0.01))
    report = verify_points(part, reference_from_module(part), GridPoint({"batch": 2, "sequence": 7}, 0), pad_token_id=0)
    assert {(point.kind, failure.output) for point, failure in report.failures} == {
        ("padding", "text_embeds"),
        ("padding", "last_hidden_state"),
    }


def test_padding_is_not_checked_where_the_mask_is_longer_than_the_tokens() -> None:
    """A decoder with a cache: its mask covers the past, too."""
    part = masked_part(MaskedMean())
    mask = TensorSpec("attention_mask", "int64", ("batch", "total_sequence"))
    inputs = (part.signature.inputs[0], mask, part.signature.inputs[2])
    signature = replace(part.signature, inputs=inputs, axes=(*part.signature.axes, Axis("total_sequence", 1, 12)))
    longer = replace(part, signature=signature)
    point = GridPoint({"batch": 1, "sequence": 7, "total_sequence": 7}, 0)
    report = verify_points(longer, reference_from_module(longer), point, pad_token_id=0)
    assert [point.kind for point in report.points] == ["grid"]


def test_padding_is_not_checked_where_there_is_no_sequence(parts: dict[str, Part]) -> None:
    run = reference_from_module(parts["vision"])
    report = verify_points(parts["vision"], run, GridPoint({"batch": 1}, 0), pad_token_id=0)
    assert [point.kind for point in report.points] == ["grid"]


TABLE = """\
part    variant  output        points  max-abs    cosine    floor     gate     seen  verdict
------  -------  ------------  ------  -------  --------  -------  -------  -------  ---------
vision  fp32     image_embeds       2  0.0e+00  1.000000  4.0e-07  3.2e-06  0.0e+00  pass
vision  fp32     image_embeds       2      nan       nan        -        -        -  FAIL at 2
vision  fp32     -                  2        -         -        -        -        -  FAIL at 2"""


def test_the_table(parts: dict[str, Part]) -> None:
    part = parts["vision"]
    run = reference_from_module(part)
    points = [GridPoint({"batch": 1}, 0), GridPoint({"batch": 1}, 1)]

    def broken(inputs: Arrays) -> Arrays:
        raise RuntimeError("boom")

    engines: list[EngineRun] = [run, lambda i: {k: v * np.float32(np.nan) for k, v in run(i).items()}, broken]
    noise = Floor("fp32", {"image_embeds": Deviation(4e-7, 5e-7, 6e-8)}, "by hand")
    floors = [FloorJudge(noise), None, None]
    reports = [
        verify_part(part, run, engine, FP32, points, floor=floor) for engine, floor in zip(engines, floors, strict=True)
    ]
    assert format_table(reports) == TABLE


def test_importing_the_verifier_does_not_import_torch() -> None:
    modules = "metrics deviation floor gates grid samples points report verifier golden recheck table tensor_proto "
    modules += "original_image"
    imports = "; ".join(f"import vlm_export.proof.{name}" for name in modules.split())
    code = f"{imports}; import sys; assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_not_run_is_told(parts: dict[str, Part]) -> None:
    part = parts["text"]
    run = reference_from_module(part)
    grid = grid_for(part.signature)[:2]
    report = verify_part(part, run, run, FP32, grid, pad_token_id=0, with_self_checks=False, not_run=("sizes: slow",))
    assert {point.kind for point in report.points} == {"grid"}
    told = ["sizes: slow", "the engine against itself: rows of a batch alone, padded tokens"]
    assert report.to_json()["not_run"] == told
    assert format_table([report]).splitlines()[-2:] == [f"not run: text fp32: {text}" for text in told]
    whole = verify_part(part, run, run, FP32, grid, pad_token_id=0)
    assert whole.to_json()["not_run"] == []
    assert "not run" not in format_table([whole])
