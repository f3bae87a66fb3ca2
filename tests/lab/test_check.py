"""`check`: passes on a demo bundle, and each of its items fails on a fault that is planted for it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import vlm_export
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.lab.check import CheckOptions, check
from vlm_export.lab.checklist import Checklist, OwnItems, read_items
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.session import Session

Change = Callable[[ir.Model], None]
Relist = Callable[[Path], None]
FEW = 4


def checked(bundle: Path, **options: Any) -> Checklist:
    return check(bundle, CheckOptions(**{"runs": FEW, "threads": 1, **options}))


def graph_changed(bundle: Path, relist: Relist, file: str, change: Change) -> None:
    path = bundle / "onnx" / file
    model = ir.load(path)
    change(model)
    model.graph.sort()
    ir.save(model, path)
    relist(bundle)


def manifest_changed(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "vlm_export.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def constant(model: ir.Model, name: str, values: Any) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(values, name=name)
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
    )
    model.graph.register_initializer(value)
    return value


def add(model: ir.Model, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """A new node, which nothing reads yet."""
    name = f"planted_{len(model.graph)}"
    node = ir.node(operator, inputs, attributes, name=name)
    node.outputs[0].name = f"{name}_output"
    model.graph.append(node)
    return node.outputs[0]


def read_instead(value: ir.Value, new: ir.Value) -> None:
    """What reads a tensor reads another one, which was made of it."""
    for use in value.uses():
        if use.node is not new.producer():
            use.node.replace_input_with(use.idx, new)


def give_instead(model: ir.Model, operator: str, *inputs: ir.Value, **attributes: Any) -> None:
    """The graph's first output passes a further operator."""
    output = model.graph.outputs[0]
    new = add(model, operator, output, *inputs, **attributes)
    output.name, new.name = f"{output.name}_before", output.name
    new.type, new.shape = output.type, output.shape
    model.graph.outputs[0] = new


def dropout_that_drops(model: ir.Model) -> None:
    (ids,) = model.graph.inputs
    value = next(iter(ids.uses())).node.outputs[0]
    ratio, training = constant(model, "ratio", np.array(0.5, np.float32)), constant(model, "mode", np.array(True))
    read_instead(value, add(model, "Dropout", value, ratio, training))


def random_numbers(model: ir.Model) -> None:
    add(model, "RandomNormalLike", model.graph.outputs[0])


def places_of_ids(model: ir.Model) -> None:
    add(model, "NonZero", model.graph.inputs[0])


def one_name_twice(model: ir.Model) -> None:
    first, second, *_ = model.graph
    second.name = first.name


def fixed_length(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["batch", 32])


def identity_inside(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "LayerNormalization")
    read_instead(node.outputs[0], add(model, "Identity", node.outputs[0]))


def product_of_constants(model: ir.Model) -> None:
    """A bias that is computed at every run."""
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    bias = norm.inputs[2]
    assert bias is not None
    assert bias.const_value is not None
    row = bias.const_value.numpy().reshape(1, -1)
    rows, unit = constant(model, "row", row), constant(model, "unit", np.eye(row.size, dtype=np.float32))
    shape = constant(model, "flat", np.array([-1], np.int64))
    norm.replace_input_with(2, add(model, "Reshape", add(model, "MatMul", rows, unit), shape))


def seventeen_tokens(model: ir.Model) -> None:
    (ids,) = model.graph.inputs
    bounds = [constant(model, name, np.array([value], np.int64)) for name, value in (("start", 0), ("stop", 17))]
    read_instead(ids, add(model, "Slice", ids, *bounds, constant(model, "axis", np.array([1], np.int64))))


def two_rows(model: ir.Model) -> None:
    bounds = [constant(model, name, np.array([value], np.int64)) for name, value in (("start", 0), ("stop", 2))]
    give_instead(model, "Slice", *bounds)


def divided_by_contrast(model: ir.Model) -> None:
    """An image of one colour becomes NaN, and no other does."""
    (pixels,) = model.graph.inputs
    axes = constant(model, "sides", np.array([2, 3], np.int64))
    ends = [add(model, operator, pixels, axes) for operator in ("ReduceMax", "ReduceMin")]
    contrast = add(model, "Sub", *ends)
    scaled = add(model, "Mul", pixels, add(model, "Div", contrast, contrast))
    made = {end.producer() for end in ends}
    for use in pixels.uses():
        if use.node not in made and use.node is not scaled.producer():
            use.node.replace_input_with(use.idx, scaled)


def infinite(model: ir.Model) -> None:
    give_instead(model, "Mul", constant(model, "infinity", np.array(np.inf, np.float32)))


@pytest.mark.parametrize(
    ("item", "file", "change", "told"),
    [
        ("eval mode", "text_model.onnx", dropout_that_drops, "Dropout"),
        ("no training operators", "text_model.onnx", random_numbers, "RandomNormalLike"),
        ("no control flow on data", "text_model.onnx", places_of_ids, "NonZero"),
        ("names", "text_model.onnx", one_name_twice, "several nodes have one name"),
        ("axes", "text_model.onnx", fixed_length, "'sequence' is fixed at 32"),
        ("simplified", "vision_model.onnx", identity_inside, "1 Identity"),
        ("simplified", "text_model.onnx", product_of_constants, "products of constants"),
        ("several sizes", "text_model.onnx", seventeen_tokens, "[1, 32]"),
        ("several batches", "vision_model.onnx", two_rows, "[3, 3, 64, 64]"),
        ("boundary inputs", "vision_model.onnx", divided_by_contrast, "NaN"),
        ("latency", "text_model_fp16.onnx", infinite, "text fp16: text_embeds"),
    ],
)
def test_a_fault_of_a_graph_fails_its_item(
    item: str, file: str, change: Change, told: str, copied: Path, relist: Relist
) -> None:
    graph_changed(copied, relist, file, change)
    found = checked(copied).item(item)
    assert found.verdict == "FAIL"
    assert told in " ".join(found.failures)


def no_proof(manifest: dict[str, Any]) -> None:
    manifest["parts"][0]["variants"][0]["verification"]["passed"] = False


def no_contract(manifest: dict[str, Any]) -> None:
    manifest["export"]["contract"] = None


def older_engine(manifest: dict[str, Any]) -> None:
    manifest["parts"][1]["variants"][0]["oldest_onnxruntime"] = "1.15.1"


@pytest.mark.parametrize(
    ("item", "change", "told"),
    [
        ("gates passed", no_proof, "vision fp32"),
        ("gates passed", no_contract, "contract"),
        ("oldest ONNX Runtime", older_engine, "1.20.0"),
    ],
)
def test_a_fault_of_the_manifest_fails_its_item(
    item: str, change: Callable[[dict[str, Any]], None], told: str, copied: Path
) -> None:
    manifest_changed(copied, change)
    found = checked(copied)
    assert [failed.name for failed in found.failed] == [item]
    assert told in found.item(item).failures[0]


def test_a_provider_that_runs_nothing_fails(demo: Path) -> None:
    found = checked(demo, providers=("azure",)).item("provider")
    assert found.verdict == "FAIL"
    assert "AzureExecutionProvider runs no node" in found.failures[0]
    assert "CPUExecutionProvider" in found.evidence[0]


def test_memory_that_grows_fails(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, run = list[mmap.mmap](), Session.run

    def keeping(self: Session, part: str, feeds: Any) -> Any:
        # Not the allocator's memory, of which the tests before this one may have given enough back.
        kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(bytes([1]) * (1 << 20))
        return run(self, part, feeds)

    monkeypatch.setattr(Session, "run", keeping)
    found = checked(demo, runs=40).item("long run")
    assert found.verdict == "FAIL"
    assert "memory grows" in found.failures[0]


def test_limits_that_are_not_kept_fail(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_session, start_engine = Session.__init__, OrtEngine.__init__

    def careless(self: Session, bundle: Any, **options: Any) -> None:
        open_session(self, bundle, **{name: value for name, value in options.items() if name != "max_pixels"})

    def greedy(self: OrtEngine, path: Any, **options: Any) -> None:
        start_engine(self, path, **{**options, "threads": 4})

    monkeypatch.setattr(Session, "__init__", careless)
    monkeypatch.setattr(OrtEngine, "__init__", greedy)
    found = checked(demo).item("threads and limits")
    assert found.failures == (
        "threads=1 is not kept: the engine started 3 beside the caller's",
        "max_pixels=1000: an image of 2000 pixels is taken",
    )


def test_memory_that_nobody_tells_is_not_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("check", "check_runs"):
        monkeypatch.setattr(f"vlm_export.lab.{module}.anonymous_bytes", lambda: None)
    found = check(demo, CheckOptions(runs=4, threads=1, items=OwnItems(max_memory_mb=1.0)))
    assert [found.item(name).verdict for name in ("long run", "max_memory_mb")] == ["NOT RUN", "NOT RUN"]


def test_a_demo_passes_every_item(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(demo), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"]
    assert {item["verdict"] for item in data["items"]} == {"PASS"}
    assert len(data["items"]) == 15
    assert all(item["evidence"] for item in data["items"])


@pytest.mark.slow
def test_a_bundle_of_slices_passes(slice_bundle: Callable[[str], Path]) -> None:
    check(slice_bundle("v2_6")).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip-demo-caption", "blip-demo-vqa", "nanovlm-demo"])
def test_the_other_demos_pass(name: str, tmp_path: Path) -> None:
    vlm_export.export(name, tmp_path / name, threads=1)
    check(tmp_path / name).raise_if_failed()


def test_a_bundle_without_records_has_items_that_are_not_run(copied: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: file for name, file in manifest["files"].items() if "golden" not in name}

    manifest_changed(copied, forget)
    found = checked(copied)
    names = ("several sizes", "several batches", "long run", "provider", "latency")
    assert {found.item(name).verdict for name in names} == {"NOT RUN"}
    assert found.failed == ()


OWN = """max_size_mb: 0.5
max_latency_ms: 0.00001
max_memory_mb: 1
required_outputs: [image_embeds, logits]
required_parts: [vision, decoder]
required_precisions: [fp16, int8]
required_tasks: [embed, caption]
oldest_onnxruntime: 1.18.0
"""


def test_items_of_the_users_own(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "items.yaml"
    path.write_text(OWN, encoding="utf-8")
    own = read_items(path)
    found = checked(demo, items=own)
    assert [item.name for item in found.failed] == [line.partition(":")[0] for line in OWN.splitlines()]
    assert "'logits'" in found.item("required_outputs").failures[0]
    met = OwnItems(max_size_mb=1e3, max_latency_ms=1e6, required_outputs=("text_embeds",), required_tasks=("embed",))
    assert checked(demo, items=met).failed == ()
    assert main(["check", str(demo), "--runs", "4", "--items", str(path)]) == 1
    assert "max_size_mb" in capsys.readouterr().out


def test_items_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.yaml"
    path.write_text("max_latency: 5\n", encoding="utf-8")
    with pytest.raises(InputError, match="max_latency") as caught:
        read_items(path)
    assert "max_latency_ms" in caught.value.fix
    path.write_text("max_size_mb: large\n", encoding="utf-8")
    with pytest.raises(InputError, match="max_size_mb"):
        read_items(path)
    path.write_text("max_size_mb: 1\nmax_size_mb: 2\n", encoding="utf-8")
    with pytest.raises(UsageError, match="YAML"):
        read_items(path)
