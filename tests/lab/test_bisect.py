"""`bisect`: names the module that differs, whatever differs before and behind it, and is silent about rounding."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from vlm_export.cli.main import main
from vlm_export.errors import GraphError, InputError, UsageError, VerificationError
from vlm_export.graph.prove.program import ModelProgram
from vlm_export.lab.bisect import Bisection, BisectOptions, bisect, bisection_plot, record_values
from vlm_export.lab.module_paths import module_paths
from vlm_export.lab.module_walk import compare_with_modules, without_moved_tensors
from vlm_export.lab.output_diff import sample_inputs
from vlm_export.lab.regions import run_region
from vlm_export.runtime.engines.choice import engine_choice

Change = Callable[[ir.Model], None]


def graph_of(bundle: Path, part: str) -> Path:
    return bundle / "onnx" / f"{part}_model.onnx"


def planted(bundle: Path, part: str, folder: Path, change: Change, output: Path | None = None) -> Bisection:
    """A part against itself with a fault."""
    model = ir.load(graph_of(bundle, part))
    change(model)
    ir.save(model, folder / "faulty.onnx")
    (found,) = bisect(graph_of(bundle, part), folder / "faulty.onnx", BisectOptions(output=output))
    return found


def weight_change(name: str, change: Callable[[np.ndarray], None]) -> Change:
    def apply(model: ir.Model) -> None:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        values = tensor.numpy().copy()
        change(values)
        model.graph.initializers[name].const_value = ir.tensor(values)

    return apply


def negate_one(values: np.ndarray) -> None:
    values.reshape(-1)[7] *= -1


def double(values: np.ndarray) -> None:
    values *= 1.001


def epsilon(number: int) -> Change:
    def apply(model: ir.Model) -> None:
        norm = [node for node in model.graph if node.op_type == "LayerNormalization"][number]
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1.1e-5)

    return apply


def without_mask(model: ir.Model) -> None:
    softmax = [node for node in model.graph if node.op_type == "Softmax"][1]
    assert softmax.inputs[0] is not None
    mask = softmax.inputs[0].producer()
    assert mask is not None
    softmax.replace_input_with(0, mask.inputs[0])


def plain_gelu(model: ir.Model) -> None:
    """x · sigmoid(1.702 x) becomes Gelu(x) in one block."""
    product = [node for node in model.graph if node.op_type == "Mul" and reads_sigmoid(node)][2]
    new = ir.node("Gelu", [product.inputs[0]], version=20)
    model.graph.opset_imports[""] = 20
    ir.convenience.replace_nodes_and_values(model.graph, product, [product], [new], product.outputs, new.outputs)


def reads_sigmoid(node: ir.Node) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(maker is not None and maker.op_type == "Sigmoid" for maker in makers)


def other_heads(model: ir.Model) -> None:
    """The axes of one block's heads are mixed up in a way that shapes do not show."""
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.attributes["axis"] = ir.AttrInt64("axis", -2)


def scaled_output(model: ir.Model) -> None:
    last = model.graph.outputs[0].producer()
    assert last is not None
    half = ir.val("half", ir.DataType.FLOAT, [], const_value=ir.tensor(np.float32(1.0001)))
    model.graph.initializers["half"] = half
    scaled = ir.node("Mul", [last.inputs[0], half])
    model.graph.insert_before(last, scaled)
    last.replace_input_with(0, scaled.outputs[0])


@pytest.mark.parametrize(
    ("part", "change", "module"),
    [
        ("vision", weight_change("blocks.2.mlp.fc2.bias", negate_one), "blocks.2.mlp.fc2"),
        ("vision", weight_change("blocks.0.attn.qkv.weight.transposed", negate_one), "blocks.0.attn.qkv"),
        ("vision", weight_change("position_embedding", double), "position_embedding"),
        ("text", weight_change("norm.weight", double), "norm"),
        ("text", epsilon(3), "blocks.1.norm2"),
        ("text", without_mask, "blocks.1.attn"),
        ("vision", plain_gelu, "blocks.2.mlp"),
        ("text", other_heads, "blocks.0.attn"),
        ("vision", scaled_output, "projection"),
    ],
)
def test_the_module_that_differs_is_named(part: str, change: Change, module: str, demo: Path, tmp_path: Path) -> None:
    found = planted(demo, part, tmp_path, change)
    assert found.samples >= 8
    assert [region.path for region in found.regions if region.parts] == [module]
    with pytest.raises(VerificationError, match="the two part") as error:
        found.raise_if_parted()
    assert error.value.where == module


def test_each_of_two_faults_is_named_and_the_first_comes_first(demo: Path, tmp_path: Path) -> None:
    def both(model: ir.Model) -> None:
        weight_change("blocks.3.norm1.bias", negate_one)(model)
        weight_change("blocks.1.attn.out.bias", negate_one)(model)

    found = planted(demo, "vision", tmp_path, both)
    assert [region.path for region in found.regions if region.parts] == ["blocks.1.attn.out", "blocks.3.norm1"]
    assert "blocks.1.attn.out.bias" in str(found.causes)
    behind = found.regions[[region.path for region in found.regions].index("blocks.1.attn.out") + 1]
    assert behind.own == 0 < behind.total


def test_an_equal_graph_parts_nowhere(demo: Path, tmp_path: Path) -> None:
    found = planted(demo, "text", tmp_path, lambda _model: None)
    assert {(region.own, region.total) for region in found.regions} == {(0.0, 0.0)}
    found.raise_if_parted()


def test_rounding_to_half_is_no_fault_and_an_overflow_is(demo: Path, copied: Path) -> None:
    for found in bisect(demo, demo, BisectOptions(right_precision="fp16")):
        assert found.first is None
        assert 1e-5 < found.regions[-1].total < 1e-2

    half = copied / "onnx" / "vision_model_fp16.onnx"
    model = ir.load(half)
    weight_change("blocks.1.mlp.fc1.bias", lambda values: values.__setitem__(0, 60000))(model)
    whole = ir.load(graph_of(demo, "vision"))
    weight_change("blocks.1.mlp.fc1.bias", lambda values: values.__setitem__(0, 60000))(whole)
    weight_change("blocks.1.mlp.fc2.weight.transposed", lambda values: values.__setitem__((0, 0), 3))(model)
    weight_change("blocks.1.mlp.fc2.weight.transposed", lambda values: values.__setitem__((0, 0), 3))(whole)
    ir.save(model, half)
    ir.save(whole, copied / "whole.onnx")
    (found,) = bisect(copied / "whole.onnx", half)
    assert found.first is not None
    assert found.first.path == "blocks.1.mlp.fc2"
    assert found.first.own == np.inf


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_fault_is_named_in_another_engine_and_rounding_is_none(engine: str, demo: Path, tmp_path: Path) -> None:
    planted(demo, "text", tmp_path, other_heads)
    sides = graph_of(demo, "text"), tmp_path / "faulty.onnx"
    (found,) = bisect(*sides, BisectOptions(engine=engine_choice(engine, None, 1)))
    assert {region.path for region in found.regions if region.parts} == {"blocks.0.attn"}
    assert max(region.own for region in found.regions if not region.parts) < 1e-5


def test_the_original_in_pytorch_agrees_and_a_fault_of_the_graph_is_named(
    demo: Path, copied: Path, relist: Callable[[Path], None]
) -> None:
    agreed = bisect(demo, "clip-demo")
    assert [found.first for found in agreed] == [None, None]
    assert all(found.regions[-1].tensor in ("image_embeds", "text_embeds") for found in agreed)

    path = copied / "onnx" / "vision_model.onnx"
    model = ir.load(path)
    plain_gelu(model)
    ir.save(model, path)
    relist(copied)
    (found,) = bisect(copied, "clip-demo", BisectOptions(part="vision", output=copied / "culprit"))
    assert found.first is not None
    assert found.first.path == "vision.blocks.2.mlp"
    assert (copied / "culprit" / "vision" / "region.onnx").is_file()


def test_the_module_is_written_as_a_model_that_shows_the_fault(demo: Path, tmp_path: Path) -> None:
    found = planted(demo, "text", tmp_path, epsilon(1), tmp_path / "culprit")
    session = onnxruntime.InferenceSession(found.subgraph)
    inputs = dict(np.load(tmp_path / "culprit" / "inputs.npz"))
    (expected,) = np.load(tmp_path / "culprit" / "expected.npz").values()
    (got,) = session.run(None, inputs)
    assert got.shape == expected.shape
    assert not np.array_equal(got, expected)
    assert len(ir.load(found.subgraph).graph) == 1


def test_the_plot_is_an_image_with_a_line_for_each_error(demo: Path, tmp_path: Path) -> None:
    root = ET.fromstring(bisection_plot(planted(demo, "text", tmp_path, epsilon(2))))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_sides_that_cannot_be_compared_are_refused(demo: Path, tmp_path: Path) -> None:
    ids = ir.val("ids", ir.DataType.INT64, [1])
    shape = ir.node("Shape", [ids])
    shape.outputs[0].name = "shape"
    graph = ir.Graph([ids], shape.outputs, nodes=[shape], name="other", opset_imports={"": 18})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "empty.onnx")
    with pytest.raises(GraphError, match="corresponds"):
        bisect(graph_of(demo, "text"), tmp_path / "empty.onnx")
    with pytest.raises(UsageError, match="float32"):
        bisect(demo, "clip-demo", BisectOptions(precision="fp16"))
    with pytest.raises(UsageError, match="ONNX Runtime"):
        bisect(demo, "clip-demo", BisectOptions(engine=engine_choice("openvino", None, 1)))
    with pytest.raises(InputError):
        bisect(demo, demo, BisectOptions(part="decoder"))


def test_the_command(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", str(demo), "--part", "text", "--plot", str(tmp_path / "errors.svg")]) == 0
    assert "no module differs by more than rounding" in capsys.readouterr().out
    assert (tmp_path / "errors.svg").read_text(encoding="utf-8").startswith("<svg")
    for alone in ([str(graph_of(demo, "text"))], [str(demo), "--precision", "fp16"], [str(demo), "--against", "bf16"]):
        assert main(["bisect", *alone]) == 2
        assert "name B, or --engine" in capsys.readouterr().err
    planted(demo, "text", tmp_path, epsilon(0))
    graphs = [str(graph_of(demo, "text")), str(tmp_path / "faulty.onnx")]
    assert main(["bisect", *graphs, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["parted"] is True
    assert data["bisections"][0]["first"]["path"] == "blocks.0.norm1"


def test_a_constant_that_was_folded_into_weights_is_no_fault(demo: Path) -> None:
    """The graph then holds another tensor at the border of a module than the module gives."""
    graph = ir.load(graph_of(demo, "text"))
    inputs = sample_inputs(graph)
    modules = ("blocks.0.norm2", "blocks.0.mlp.fc1", "blocks.1.norm2")
    paths = module_paths(graph.graph)
    ends = {path: [node for node in graph.graph if paths[node] == path][-1] for path in modules}

    def values_of(names: Collection[str]) -> dict[str, list[Any]]:
        tensors = {name: ends[name].outputs[0] for name in names if name in ends}
        tensors |= {"output text_embeds": graph.graph.outputs[0]} if "output text_embeds" in names else {}
        program = ModelProgram(graph)
        runs = [program.run(feeds, [str(value.name) for value in tensors.values()]) for feeds in inputs]
        found = {name: [run[index] for run in runs] for index, name in enumerate(tensors)}
        # As if the module's output lacked what the graph has added by then.
        return {
            name: [array + 1 if name == modules[0] else array for array in arrays] for name, arrays in found.items()
        }

    compared = list(compare_with_modules(graph, modules, values_of, inputs))
    assert [one.error.path for one in compared if one.error.parts][:1] == [modules[0]]
    assert not [one.error for one in without_moved_tensors(compared) if one.error.parts]


def cut_the_output(model: ir.Model) -> None:
    """Behind the last tensor that both graphs have."""
    last = model.graph.outputs[0]
    limit = ir.val("limit", ir.DataType.FLOAT, [], const_value=ir.tensor(np.float32(0.1)))
    model.graph.initializers["limit"] = limit
    node = ir.node("Clip", [last, None, limit])
    node.outputs[0].name, last.name = last.name, "whole"
    node.outputs[0].type, node.outputs[0].shape = last.type, last.shape
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]


def pool_at_the_last_end(model: ir.Model) -> None:
    """An attribute of a node whose integers another module reads."""
    node = next(node for node in model.graph if node.op_type == "ArgMax")
    node.attributes["select_last_index"] = ir.AttrInt64("select_last_index", 1)


def tie_the_blocks(model: ir.Model) -> None:
    """The second block reads the weights of the first."""
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            name = "" if value is None else str(value.name)
            if name.startswith("blocks.1."):
                node.replace_input_with(index, model.graph.initializers[name.replace("blocks.1.", "blocks.0.")])


@pytest.mark.parametrize(
    ("change", "path", "cause"),
    [
        (cut_the_output, "projection", "operators: none → Clip"),
        (pool_at_the_last_end, "norm", "ArgMax's select_last_index: 0 → 1"),
        (tie_the_blocks, "blocks.1.norm1", "blocks.1.norm1.bias: 128 of 128 values differ"),
    ],
)
def test_faults_at_odd_places_are_named_with_their_cause(
    change: Change, path: str, cause: str, demo: Path, tmp_path: Path
) -> None:
    found = planted(demo, "text", tmp_path, change)
    assert found.first is not None
    assert found.first.path == path
    assert cause in str(found.causes[0])


def test_outputs_that_are_exchanged_part(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
        a = Tanh (x)  b = Sigmoid (x)  y = Identity (a)  z = Identity (b)
    }"""
    for name, graph in (
        ("left", text),
        ("right", text.replace("(a)", "(c)").replace("(b)", "(a)").replace("(c)", "(b)")),
    ):
        onnx.save(onnx.parser.parse_model(graph), tmp_path / f"{name}.onnx")
    (found,) = bisect(tmp_path / "left.onnx", tmp_path / "right.onnx")
    assert found.first is not None


def test_a_record_of_another_version_is_compared_with_this_one(
    demo: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other version is this one, so that nothing parts; then a kernel of this one is wrong."""
    record = tmp_path / "values.npz"
    with monkeypatch.context() as other:
        other.setattr("vlm_export.lab.value_record.version", lambda _name: "1.19.2")
        assert record_values(demo, record) == ("vision", "text")
    for found in bisect(demo, record):
        assert found.first is None
        assert found.samples >= 8
        assert "onnxruntime 1.19.2" in found.left
        assert onnxruntime.__version__ in found.right

    def wrong_softmax(model: ir.Model, feeds: Any) -> Any:
        runs = run_region(model, feeds)
        wrong = any(node.op_type == "Softmax" for node in model.graph)
        return [{name: array * 1.001 if wrong else array for name, array in run.items()} for run in runs]

    monkeypatch.setattr("vlm_export.lab.bisect.run_region", wrong_softmax)
    (found,) = bisect(copied, record, BisectOptions(part="text", output=tmp_path / "culprit"))
    assert found.first is not None
    assert found.first.path == "text.blocks.0.attn"
    assert Path(found.subgraph).exists()


def test_a_record_is_of_one_graph_and_its_damage_is_told(demo: Path, tmp_path: Path) -> None:
    record = tmp_path / "half.npz"
    record_values(demo, record, part="text", precision="fp16")
    assert bisect(demo, record, BisectOptions(precision="fp16"))[0].first is None
    with pytest.raises(InputError, match="another graph") as error:
        bisect(demo, record)
    assert "--precision fp16" in error.value.fix
    with pytest.raises(InputError, match="no such part"):
        bisect(demo, record, BisectOptions(precision="fp16", part="vision"))
    with pytest.raises(UsageError, match="the output exists"):
        record_values(demo, record)
    with pytest.raises(UsageError, match="a record is an"):
        record_values(demo, tmp_path / "values.zip")
    content = record.read_bytes()
    packed = io.BytesIO()
    with ZipFile(record) as stored, ZipFile(packed, "w", ZIP_DEFLATED) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    middle = len(content) // 2
    torn = content[:middle] + b"x" * 40 + content[middle + 40 :]
    for damaged in (b"", content[:-100], torn, packed.getvalue()):
        record.write_bytes(damaged)
        with pytest.raises(InputError, match="no record of a bundle's values"):
            bisect(demo, record, BisectOptions(precision="fp16"))


def test_a_record_is_made_on_the_command_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    record = tmp_path / "values.npz"
    assert main(["bisect", str(demo), "--record", str(record), "--part", "text", "--json"]) == 0
    stated = json.loads(capsys.readouterr().out)
    assert (stated["parts"], stated["bytes"]) == (["text"], record.stat().st_size)
    assert main(["bisect", str(demo), str(record)]) == 0
    assert f"in onnxruntime {onnxruntime.__version__}" in capsys.readouterr().out
    assert main(["bisect", str(demo), str(demo), "--record", str(record)]) == UsageError.exit_status


def test_inputs_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => (float[N, 4] y) { y = Tanh (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    for values, told in ((np.zeros((0, 4)), "no row"), (np.full((2, 4), np.nan), "NaN")):
        np.savez(tmp_path / "x.npz", x=values.astype(np.float32))
        with pytest.raises(UsageError, match=told):
            bisect(tmp_path / "a.onnx", tmp_path / "a.onnx", BisectOptions(inputs=[tmp_path / "x.npz"]))


def test_integers_that_a_graph_returns_are_compared(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => (int64[N] ids) {
        y = Tanh (x)  ids = ArgMax <axis = 1, keepdims = 0> (y)
    }"""
    for name, graph in (("a", text), ("b", text.replace("ArgMax", "ArgMin"))):
        onnx.save(onnx.parser.parse_model(graph), tmp_path / f"{name}.onnx")
    (found,) = bisect(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert found.first is not None


def test_a_plot_shows_control_characters_as_escapes() -> None:
    found = Bisection("left\x1b[31m", "right", 1, ())
    assert "\\x1b[31m" in bisection_plot(found)
