"""`ranges`: names what float16 would lose before anything is converted, and is silent about a clean model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.graph.prove.program import ModelProgram
from vlm_export.lab.ranges import KINDS, Finding, Ranges, checked_kinds, ranges
from vlm_export.lab.real_inputs import real_inputs
from vlm_export.lab.tensor_stats import TensorStats
from vlm_export.lab.value_walk import walk_values
from vlm_export.precision.fp16 import convert_to_fp16
from vlm_export.precision.fp16_ranges import MOST, graph_of_ranges
from vlm_export.precision.fp16_rounding import round_every_float16
from vlm_export.proof.points import Arrays

Array = npt.NDArray[np.float32]
Change = Callable[[Array], Array]
Relist = Callable[[Path], None]
MLP, ATTENTION = "blocks.2.mlp", "blocks.2.attn"


def times(factor: float) -> Change:
    return lambda values: values * np.float32(factor)


def first_channel_zero(values: Array) -> Array:
    """Of a bias (N,) or a matrix (in, out)."""
    values[..., 0] = 0
    return values


def all_one(values: Array) -> Array:
    return np.ones_like(values)


def vision_graph(bundle: Path) -> Path:
    return bundle / "onnx" / "vision_model.onnx"


def change_weights(bundle: Path, relist: Relist, changes: Mapping[str, Change]) -> None:
    """Changes weights of the vision part's float32 graph by the names of their parameters."""
    model = ir.load(vision_graph(bundle))
    for parameter, change in changes.items():
        name = next(name for name in model.graph.initializers if name.startswith(parameter))
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        model.graph.initializers[name].const_value = ir.tensor(change(tensor.numpy().copy()), name=name)
    ir.save(model, vision_graph(bundle))
    relist(bundle)


def outputs_of(model: ir.Model, inputs: Arrays) -> Array:
    """The image embeddings, with every float16 value rounded as hardware rounds it."""
    copy = model.clone()
    round_every_float16(copy)
    (output,) = ModelProgram(copy).run(inputs, ["image_embeds"])
    return output


@pytest.fixture(scope="module")
def clean(demo: Path) -> Ranges:
    return ranges(demo)


def test_an_overflow_is_predicted_before_the_conversion(copied: Path, relist: Relist) -> None:
    """As in SigLIP's large encoders: hidden values in the hundred thousands, which the second projection takes back."""
    larger, smaller = times(3e4), times(1 / 3e4)
    fc1 = {f"{MLP}.fc1.weight": larger, f"{MLP}.fc1.bias": larger}
    change_weights(copied, relist, {**fc1, f"{MLP}.fc2.weight": smaller})
    found = ranges(copied, parts=["vision"])
    overflows = found.of(["overflow"])
    assert {finding.where.removesuffix(".fc1") for finding in overflows} == {f"vision.{MLP}"}
    assert overflows[0].peak > 65504
    (part,) = found.parts
    assert {entry.where.partition(MLP)[1] for entry in part.keep} == {MLP}

    bundle = open_bundle(copied)
    runs = real_inputs(bundle, bundle.manifest.part("vision"))
    model, inputs = ir.load(vision_graph(copied)), runs[-1]
    assert part.wide == wide_as_exported(model, runs)
    expected = outputs_of(model, inputs)
    assert np.isfinite(expected).all()
    assert not np.isfinite(outputs_of(convert_to_fp16(model), inputs)).all()
    planned = outputs_of(convert_to_fp16(model, part.wide), inputs)
    np.testing.assert_allclose(planned, expected, atol=0.02 * np.abs(expected).max())


def wide_as_exported(model: ir.Model, runs: Sequence[Arrays]) -> dict[str, float]:
    """What an export measures for its float16 graph, by a graph of ranges."""
    measured, names = graph_of_ranges(model)
    program, peaks = ModelProgram(measured), dict[str, float]()
    for inputs in runs:
        for output, value in zip(names, program.run(inputs, list(names)), strict=True):
            peaks[names[output]] = max(peaks.get(names[output], 0.0), abs(float(value)))
    return {name: peak for name, peak in peaks.items() if peak > MOST}


@pytest.mark.parametrize(
    ("changes", "kind", "where", "operator"),
    [
        (
            {f"{MLP}.fc1.weight": first_channel_zero, f"{MLP}.fc1.bias": first_channel_zero},
            "dead-channels",
            f"{MLP}.fc1",
            "Add",
        ),
        ({f"{MLP}.fc1.weight": times(0), f"{MLP}.fc1.bias": all_one}, "constant", MLP, "Mul"),
        ({f"{MLP}.fc1.weight": times(0), f"{MLP}.fc1.bias": times(0)}, "zero", MLP, "Mul"),
        ({f"{MLP}.fc1.weight": times(1e-6), f"{MLP}.fc1.bias": times(1e-6)}, "denormal", MLP, "Mul"),
        ({f"{MLP}.fc1.weight": times(1e-9), f"{MLP}.fc1.bias": times(1e-9)}, "flushed", MLP, "Mul"),
        ({f"{MLP}.fc2.weight": times(1e9)}, "overflow", f"{MLP}.fc2", "weight"),
        ({f"{ATTENTION}.qkv.weight": times(100)}, "saturated", ATTENTION, "Softmax"),
    ],
)
def test_what_is_planted_is_found(
    changes: Mapping[str, Change], kind: str, where: str, operator: str, copied: Path, relist: Relist, clean: Ranges
) -> None:
    change_weights(copied, relist, changes)
    found = ranges(copied, parts=["vision"])
    assert (f"vision.{where}", operator) in places(found, kind)
    assert (f"vision.{where}", operator) not in places(clean, kind)


def places(found: Ranges, kind: str) -> set[tuple[str, str]]:
    return {(finding.where, finding.operator) for finding in found.findings if finding.kind == kind}


def test_a_clean_model_has_no_overflow_and_its_mask_is_told_as_one(clean: Ranges) -> None:
    assert clean.of(["non-finite", "overflow", "near-overflow", "zero", "constant", "dead-channels", "saturated"]) == ()
    assert all(part.wide == {} and part.keep == () and part.not_run == () for part in clean.parts)
    assert places(clean, "mask") == {("text.blocks.0.attn", "Add"), ("text.blocks.1.attn", "Add")}
    assert [part.samples for part in clean.parts] == [19, 27]


def test_findings_come_worst_first() -> None:
    one, two = (Finding("flushed", "a", "Mul", "t", "", share, 1.0) for share in (0.1, 0.2))
    three = Finding("overflow", "a", "Mul", "t", "", 0.0, 1e6)
    part = vlm_export.lab.ranges.PartRanges("a", 1, {}, (one, two, three), {}, ())
    assert Ranges((part,)).findings == (three, two, one)


def test_the_command_fails_only_on_kinds_that_are_named(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranges", str(demo), "--part", "text", "--json", "--fail-on", "overflow"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {finding["kind"] for finding in data["findings"]} >= {"mask"}
    assert data["parts"][0]["tensors"]["text_embeds"]["samples"] == 27
    assert main(["ranges", str(demo), "--part", "text", "--fail-on", "overflow", "--fail-on", "mask"]) == 1
    printed = capsys.readouterr()
    assert "text: half precision needs no more operators in float32" in printed.out
    assert "text.blocks.0.attn" in printed.err


def test_unknown_kinds_and_bundles_without_float32_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="overflo") as caught:
        checked_kinds(["overflo"])
    assert "overflow" in caught.value.fix
    assert checked_kinds(["mask", "overflow"]) == ("overflow", "mask")
    vlm_export.export("clip-demo", tmp_path / "half", precisions=("fp16",), parts=("text",), threads=1)
    with pytest.raises(InputError, match="float32"):
        ranges(tmp_path / "half")


def test_a_walk_in_small_steps_sees_what_the_whole_graph_computes(demo: Path) -> None:
    bundle = open_bundle(demo)
    inputs = real_inputs(bundle, bundle.manifest.part("text"))[-2:]
    model = ir.load(demo / "onnx" / "text_model.onnx")
    seen = [(str(value.name), array) for value, array in walk_values(model, inputs, limit_bytes=1)]
    names = list(dict.fromkeys(name for name, _ in seen))
    assert len(names) > 70
    assert len(seen) == 2 * len(names)
    program = ModelProgram(model)
    for number, feeds in enumerate(inputs):
        for name, expected in zip(names, program.run(feeds, names), strict=True):
            np.testing.assert_array_equal([array for other, array in seen if other == name][number], expected)


def test_figures_of_a_tensor() -> None:
    stats = TensorStats()
    stats.add(np.array([[1, 0, -7e4], [1e-5, 0, 1e-8]], np.float32))
    stats.add(np.array([[np.nan, 0, np.inf], [-np.inf, 0, 3]], np.float32))
    assert (stats.samples, stats.count, stats.smallest, stats.largest, stats.peak) == (4, 12, -7e4, 3, 7e4)
    assert (stats.beyond, stats.denormal, stats.flushed) == (1, 2, 1)
    assert (stats.nans, stats.infinities, stats.minus_infinities, stats.dead) == (1, 1, 1, 1)
    stats.add(np.zeros((1, 5), np.float32))
    assert stats.alive is None
    assert json.loads(json.dumps(TensorStats().to_json(), allow_nan=False))["peak"] == 0
    assert len(set(KINDS)) == len(KINDS)
