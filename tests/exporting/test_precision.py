"""Half precision from the checkpoint to the runtime: the originals' records, bundles of variants, overflow, memory."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch

from vlm_export import load
from vlm_export.bundle.manifest import Manifest, manifest_from_bytes
from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError, UsageError, VerificationError
from vlm_export.exporting import pipeline, verification
from vlm_export.exporting.backends import Exporter, export_part
from vlm_export.exporting.bundle_manifest import fp32_operators
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.pipeline import ExportResult
from vlm_export.family import Model
from vlm_export.precision.fp16 import convert_to_fp16
from vlm_export.precision.fp16_rounding import round_every_float16
from vlm_export.proof.gates import GATES, judge
from vlm_export.proof.metrics import compare
from vlm_export.proof.recheck import verify_bundle
from vlm_export.runtime.engines.onnxruntime import OrtEngine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = HERE.parent / "data"
slices = SimpleNamespace(**runpy.run_path(str(HERE.parent / "models" / "minicpmv_oracle.py")))
blip = SimpleNamespace(**runpy.run_path(str(HERE.parent / "models" / "blip_oracle.py")))
Array = npt.NDArray[Any]
Export = Callable[..., ExportResult]
Build = Callable[[Path], Model]
SIZE_RATIO = 0.53


@dataclass(frozen=True)
class Halved:
    """The float16 graphs of a model's parts, as published and as hardware rounds them."""

    published: dict[str, OrtEngine]
    rounded: dict[str, OrtEngine]
    ratios: dict[str, float]


@pytest.fixture
def halve(tmp_path: Path) -> Callable[..., Halved]:
    def make(model: Model, exporter: Exporter = "torchscript", opset: int = 17) -> Halved:
        made = Halved({}, {}, {})
        for part in model.parts:
            graph = finish_graph(simplify_graph(export_part(part, opset, exporter)), part.signature)
            paths = [tmp_path / f"{part.name}_{kind}.onnx" for kind in ("fp32", "fp16", "rounded")]
            half = convert_to_fp16(graph)
            write_graph(graph, paths[0])
            write_graph(half, paths[1])
            onnx.checker.check_model(onnx.load(paths[1]), full_check=True)
            round_every_float16(half)
            write_graph(half, paths[2])
            made.published[part.name], made.rounded[part.name] = (OrtEngine(path, threads=1) for path in paths[1:])
            made.ratios[part.name] = _weights(paths[1]) / _weights(paths[0])
        return made

    return make


def _weights(path: Path) -> int:
    return sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)


def passes(expected: Array, found: Array) -> None:
    failures = judge(compare(expected.reshape(1, -1), found.reshape(1, -1)), GATES["fp16"])
    assert not failures, failures


@pytest.mark.parametrize(
    ("variant", "exporter", "opset"),
    [("rn_tiny", "torchscript", 17), ("vit_w128", "torchscript", 11), ("vit_p14", "dynamo", 18)],
)
def test_clip(
    variant: str,
    exporter: Exporter,
    opset: int,
    halve: Callable[..., Halved],
    oracle_model: Callable[[str], Model],
    oracle_record: Callable[[str], dict[str, Array]],
) -> None:
    file = f"{variant}/state_dict_fp32.pt" if variant == "vit_p14" else f"{variant}/jit_archive.pt"
    made, record = halve(oracle_model(file), exporter, opset), oracle_record(file)
    for engines in (made.published, made.rounded):
        image = engines["vision"].run({"pixel_values": record["input.image"]})["image_embeds"]
        text = engines["text"].run({"input_ids": record["input.text"]})["text_embeds"]
        passes(record["output.image_features"], image)
        passes(record["output.text_features"], text)
    assert max(made.ratios.values()) < SIZE_RATIO


@pytest.mark.parametrize("variant", blip.VARIANTS)
def test_blip(variant: str, halve: Callable[..., Halved], build_model: Build) -> None:
    made, record = halve(build_model(blip.checkpoint_path(variant))), blip.read_record(variant)
    for engines in (made.published, made.rounded):
        for name, found in blip.outputs(variant, record, lambda part, inputs, e=engines: e[part].run(inputs)):
            passes(record[name], found)
    assert max(made.ratios.values()) < SIZE_RATIO


@pytest.mark.parametrize(
    ("variant", "exporter", "opset"),
    [*((variant, "torchscript", 17) for variant in (*slices.GRID, *slices.PACKED)), ("v2_6", "dynamo", 18)],
)
def test_slices(variant: str, exporter: Exporter, opset: int, halve: Callable[..., Halved], build_model: Build) -> None:
    model = build_model(DATA / "minicpmv" / variant)
    if exporter == "dynamo":
        model = SimpleNamespace(parts=[slices.part_of(model, "vision")])  # type: ignore[assignment]  # The slow one.
    made = halve(model, exporter, opset)
    called = set()
    for case in slices.cases(variant):
        for engines in (made.published, made.rounded):
            if case.part in engines:
                (found,) = engines[case.part].run(case.inputs).values()
                passes(slices.valid(case, case.expected), slices.valid(case, found))
                called.add(case.part)
    assert called == set(made.published)
    # The tables of buckets, which stay exact, are large beside a tiny model.
    tables = 0.15 if variant in slices.PACKED else 0
    assert max(made.ratios.values()) < SIZE_RATIO + tables


def test_what_the_manifest_lists_as_float32_is(build_model: Build) -> None:
    model = build_model(blip.checkpoint_path("caption"))
    part = next(part for part in model.parts if part.name == "text_decoder")
    names = fp32_operators(part)
    assert names
    half = convert_to_fp16(simplify_graph(export_part(part, 17, "torchscript")))
    for name in names:
        assert half.graph.initializers[f"{name}.weight"].dtype == ir.DataType.FLOAT


# Bundles


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, export_fast: Export, checkpoint: Path) -> Path:
    """A bundle with both variants; tests must not change it."""
    target = tmp_path_factory.mktemp("both") / "bundle"
    export_fast(checkpoint, target, precisions=("fp32", "fp16"))
    return target


@pytest.fixture(scope="module")
def only_half(tmp_path_factory: pytest.TempPathFactory, export_fast: Export, checkpoint: Path) -> Path:
    target = tmp_path_factory.mktemp("half") / "bundle"
    export_fast(checkpoint, target, precisions=("fp16",), external_data_threshold_bytes=0)
    return target


def read_manifest(bundle: Path) -> Manifest:
    return manifest_from_bytes((bundle / "vlm_export.json").read_bytes())


def test_variants_of_every_part(both: Path) -> None:
    manifest = read_manifest(both)
    assert manifest_from_bytes(manifest.to_bytes()) == manifest
    for part in manifest.parts:
        assert [variant.precision for variant in part.variants] == ["fp32", "fp16"]
        for variant in part.variants:
            assert variant.verification is not None
            assert variant.verification["passed"]
            assert variant.verification["gate"]["name"] == variant.precision
            assert ("rounded" in variant.verification["points"]) == (variant.precision == "fp16")
        full, half = (manifest.files[variant.file].size_bytes for variant in part.variants)
        assert half < 0.6 * full
    assert {path.name for path in (both / "onnx").iterdir()} == {
        *("vision_model.onnx", "vision_model_fp16.onnx", "text_model.onnx", "text_model_fp16.onnx")
    }


def test_the_golden_records_judge_every_variant(both: Path) -> None:
    bundle = open_bundle(both)

    def start(part: str, precision: str) -> Callable[..., Any]:
        return OrtEngine(bundle.model_files(bundle.manifest.part(part).variant(precision)), threads=1).run

    reports = verify_bundle(bundle, engine_factory=start)
    assert [(report.part, report.variant, report.gate.name) for report in reports] == [
        *(("vision", name, name) for name in ("fp32", "fp16")),
        *(("text", name, name) for name in ("fp32", "fp16")),
    ]
    assert all(report.passed for report in reports)
    assert [report.variant for report in verify_bundle(bundle, engine_factory=start, precision="fp16")] == ["fp16"] * 2
    with pytest.raises(UsageError, match="int8"):
        verify_bundle(bundle, engine_factory=start, precision="int8")


def test_the_runtime_takes_the_variant_that_is_asked_for_or_there(both: Path, only_half: Path) -> None:
    images = [DATA / "clip" / "vit_p14" / "image.png"]
    full, half, alone = load(both), load(both, precision="fp16"), load(only_half)
    assert (full.precision, half.precision, alone.precision) == ("fp32", "fp16", "fp16")
    vectors = [pair.encode_image([str(path) for path in images]) for pair in (full, half, alone)]
    np.testing.assert_array_equal(vectors[1], vectors[2])
    cosine = float((vectors[0] * vectors[1]).sum())
    assert cosine >= 0.999
    assert not np.array_equal(vectors[0], vectors[1])
    with pytest.raises(UsageError, match="fp32"):
        load(only_half, precision="fp32")


def test_half_alone_writes_no_float32_graph(only_half: Path) -> None:
    names = {path.name for path in (only_half / "onnx").iterdir()}
    assert names == {f"{stem}_model_fp16.onnx{end}" for stem in ("vision", "text") for end in ("", "_data")}
    config = json.loads((only_half / "config.json").read_text(encoding="utf-8"))
    external = config["transformers.js_config"]["use_external_data_format"]
    assert external == {"vision_model_fp16.onnx": 1, "text_model_fp16.onnx": 1}
    assert load(only_half).manifest.default_precision() == "fp16"


def test_captions_are_written_in_half_precision(tmp_path: Path, export_fast: Export) -> None:
    export_fast("blip-demo-caption", tmp_path / "bundle", precisions=("fp16",), with_tokenizer=True)
    images = [str(ROOT / "configs" / "demo" / "images" / "green-triangle-small-two-left.png")]
    model = load(tmp_path / "bundle", threads=1)
    assert model.precision == "fp16"
    assert model.caption(images) == ["two small green triangles on the left"]


# What must not be published


def changed_checkpoint(checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = torch.load(checkpoint, weights_only=True)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    change(state)
    path = folder / "changed.pt"
    torch.save(state, path)
    return path


BLOCK = "visual.transformer.resblocks.0."


def enlarge_values(state: dict[str, torch.Tensor]) -> None:
    """Attention of values 2¹⁶ times as large, and an output matrix that takes it back: the same function."""
    width = state[f"{BLOCK}attn.in_proj_weight"].shape[1]
    for name in ("in_proj_weight", "in_proj_bias"):
        state[f"{BLOCK}attn.{name}"][2 * width :] *= 2.0**16
    state[f"{BLOCK}attn.out_proj.weight"] *= 2.0**-16


def enlarge_hidden_values(state: dict[str, torch.Tensor]) -> None:
    """An MLP of much larger hidden values, which no other kind of node reads."""
    for name in ("c_fc.weight", "c_fc.bias"):
        state[f"{BLOCK}mlp.{name}"] *= 2.0**14
    state[f"{BLOCK}mlp.c_proj.weight"] *= 2.0**-14


@pytest.mark.parametrize(
    ("change", "seen_by"),
    # The engine computes chains in float32 and misses what happens within them; where values are moved it does not.
    [(enlarge_values, "grid"), (enlarge_hidden_values, "rounded")],
)
def test_activations_that_overflow_are_not_published(
    change: Callable[[dict[str, torch.Tensor]], None],
    seen_by: str,
    tmp_path: Path,
    checkpoint: Path,
    export_fast: Export,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they were not measured, as in a huge part."""
    monkeypatch.setattr(pipeline, "measure_wide", lambda *_: None)
    source = changed_checkpoint(checkpoint, tmp_path, change)
    with pytest.raises(VerificationError, match="vision") as caught:
        export_fast(source, tmp_path / "half", precisions=("fp16",), parts=("vision",))
    assert f"at {seen_by} " in caught.value.where
    assert "overflow" in caught.value.got
    assert "fp16" in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir() if "half" in path.name) == []


def test_activations_that_overflow_stay_in_float32(tmp_path: Path, export_fast: Export) -> None:
    """Of an encoder of four blocks what makes or reads the hidden values of one MLP: two products and four nodes."""
    made, shares = {}, {}
    demo = ROOT / "configs" / "demo" / "clip-demo.pt"
    for name, source in (("plain", demo), ("wide", changed_checkpoint(demo, tmp_path, enlarge_hidden_values))):
        result = export_fast(source, tmp_path / name, precisions=("fp16",), parts=("vision",))
        (made[name],) = result.manifest.part("vision").variants
        graph = ir.load(tmp_path / name / made[name].file).graph
        wide = Counter(node.op_type for node in graph if node.outputs[0].dtype == ir.DataType.FLOAT)
        del wide["Cast"]
        shares[name] = wide, len(graph)
    assert shares["wide"][0] - shares["plain"][0] == Counter(MatMul=2, Mul=2, Add=1, Sigmoid=1)
    # What the rules keep without that is norms and softmax.
    assert (shares["wide"][0] - shares["plain"][0]).total() <= 0.05 * shares["wide"][1]
    assert made["plain"].warnings == ()
    (warning,) = made["wide"].warnings
    assert "float16's range" in warning
    model = load(tmp_path / "wide")
    assert np.isfinite(model.encode_image([DATA / "clip" / "vit_p14" / "image.png"])).all()


def test_a_huge_part_says_that_its_ranges_were_not_measured(
    tmp_path: Path, checkpoint: Path, export_fast: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "HUGE_PART_BYTES", 0)
    result = export_fast(checkpoint, tmp_path / "huge", precisions=("fp16",), parts=("vision",))
    (variant,) = result.manifest.part("vision").variants
    assert [warning for warning in variant.warnings if "was not measured" in warning]


def test_weights_that_overflow_are_named(
    tmp_path: Path, checkpoint: Path, export_fast: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was measured. Else what they make is seen to overflow, and they stay as they are."""
    monkeypatch.setattr(pipeline, "measure_wide", lambda *_: None)

    def enlarge(state: dict[str, torch.Tensor]) -> None:
        state["visual.conv1.weight"][0] *= 1e8

    source = changed_checkpoint(checkpoint, tmp_path, enlarge)
    for threshold in (0, 64 << 20):
        with pytest.raises(InputError, match="beyond the range of float16") as caught:
            export_fast(
                source,
                tmp_path / "half",
                precisions=("fp16",),
                parts=("vision",),
                external_data_threshold_bytes=threshold,
            )
        assert "conv.weight" in caught.value.where
        assert "write vision fp16" in caught.value.where
    assert not (tmp_path / "half").exists()


def test_a_simplified_graph_that_differs_is_taken_back(
    tmp_path: Path, checkpoint: Path, export_fast: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: ir.Model) -> ir.Model:
        result = simplify_graph(model)
        sums = [node for node in result.graph if node.op_type == "Add" and node.inputs[0] is not node.inputs[1]]
        skipped, instead = sums[-1].outputs[0], sums[-1].inputs[0]
        assert instead is not None
        ir.convenience.replace_all_uses_with(skipped, instead)
        return result

    monkeypatch.setattr(pipeline, "simplify_graph", wrong)
    result = export_fast(checkpoint, tmp_path / "bundle", precisions=("fp32", "fp16"), parts=("vision",))
    for variant in result.manifest.part("vision").variants:
        assert not variant.simplified
        assert len(variant.warnings) == 1


# Memory

SCRIPT = """
import sys
import threading
import numpy as np
import onnx_ir as ir
from pathlib import Path
from vlm_export.exporting.finishing import write_graph
from vlm_export.precision.fp16 import convert_to_fp16

folder, side, count = Path(sys.argv[1]), 2048, 16


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


with open(folder / "weights.bin", "wb") as file:
    for i in range(count):
        file.write(np.full((side, side), i, np.float32).tobytes())
value = ir.Value(name="x", shape=ir.Shape(["n", side]), type=ir.TensorType(ir.DataType.FLOAT))
inputs, nodes, weights = [value], [], []
for i in range(count):
    tensor = ir.ExternalTensor("weights.bin", i * side * side * 4, side * side * 4, ir.DataType.FLOAT,
                               shape=ir.Shape([side, side]), name=f"w{i}", base_dir=str(folder))
    weights.append(ir.Value(name=f"w{i}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
    nodes.append(ir.node("MatMul", [value, weights[-1]], name=f"n{i}"))
    value = nodes[-1].outputs[0]
    value.name, value.type = f"y{i}", ir.TensorType(ir.DataType.FLOAT)
graph = ir.Graph(inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="g")
peaks = [anonymous()]
done = threading.Event()


def watch():
    while not done.wait(0.002):
        peaks.append(anonymous())


watcher = threading.Thread(target=watch)
watcher.start()
write_graph(convert_to_fp16(ir.Model(graph, ir_version=9)), folder / "half.onnx", 0)
done.set()
watcher.join()
print(max(peaks) - peaks[0], (folder / "half.onnx_data").stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_weights_are_converted_one_at_a_time(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    growth, written = map(int, done.stdout.split())
    assert written >= 16 * 2048 * 2048 * 2
    # Two tensors, of sixteen.
    assert growth < written / 4, f"{growth >> 20} MiB more for {written >> 20} MiB of weights"
