"""`diff`: empty for what changes no computation, and the cause first for what does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import version_converter

from vlm_export.errors import UsageError, VerificationError
from vlm_export.lab.diff import DiffOptions, diff
from vlm_export.lab.differences import Diff

Change = Callable[[ir.Model], None]


def graph_of(bundle: Path) -> Path:
    return bundle / "onnx" / "text_model.onnx"


def changed_graph(bundle: Path, folder: Path, change: Change) -> Diff:
    """The text part against itself after a change."""
    model = ir.load(graph_of(bundle))
    change(model)
    ir.save(model, folder / "changed.onnx")
    return diff(graph_of(bundle), folder / "changed.onnx")


def node_of(model: ir.Model, kind: str, number: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == kind][number]


def rename(model: ir.Model) -> None:
    """Everything but the interface."""
    ends = {*model.graph.inputs, *model.graph.outputs}
    for number, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"w{number}"
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        for index, value in enumerate(node.outputs):
            if value not in ends:
                value.name = f"t{number}_{index}"


def reorder(model: ir.Model) -> None:
    """Another order of nodes that is sorted, of weights, and of the inputs of sums."""
    nodes, drawn = list(model.graph), random.Random(0)
    model.graph.remove(nodes)
    drawn.shuffle(nodes)
    model.graph.extend(nodes)
    model.graph.sort()
    for node in model.graph:
        if node.op_type in ("Add", "Mul"):
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
    weights = list(model.graph.initializers.items())
    model.graph.initializers.clear()
    model.graph.initializers.update(reversed(weights))


@pytest.mark.parametrize("change", [rename, reorder])
def test_names_and_order_are_no_difference(change: Change, demo: Path, tmp_path: Path) -> None:
    found = changed_graph(demo, tmp_path, change)
    assert found.differences == ()
    assert found.outputs[0].samples > 4


def test_weights_stored_elsewhere_are_no_difference(demo: Path, tmp_path: Path) -> None:
    model = onnx.load(graph_of(demo))
    onnx.save(model, tmp_path / "again.onnx", save_as_external_data=True, location="again.bin", size_threshold=0)
    (tmp_path / "again.onnx.backup").write_bytes(bytes(1 << 20))
    found = diff(graph_of(demo), tmp_path / "again.onnx")
    assert found.equal
    (size,) = found.measured
    assert size.right == sum((tmp_path / name).stat().st_size for name in ("again.onnx", "again.bin"))


def test_another_export_of_the_same_source_is_no_difference(demo: Path) -> None:
    found = diff(demo, "clip-demo", DiffOptions(threads=1))
    assert found.differences == ()
    assert {entry.where for entry in found.outputs} >= {"vision.image_embeds", "text(fp16).text_embeds"}
    assert found.not_run == ()


def flip_a_row(model: ir.Model) -> None:
    weight = model.graph.initializers["blocks.1.mlp.fc1.bias"]
    assert weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values[5] *= -1
    weight.const_value = ir.tensor(values)


def other_epsilon(model: ir.Model) -> None:
    node_of(model, "LayerNormalization", 1).attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-6)


def other_quick_gelu(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Mul":
            tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
            if tensor is not None and tensor.size == 1 and abs(float(tensor.numpy()) - 1.702) < 1e-3:
                value = ir.val("gelu_factor", ir.DataType.FLOAT, [], const_value=ir.tensor(np.float32(1.6)))
                model.graph.initializers["gelu_factor"] = value
                node.replace_input_with(1, value)


def one_quick_gelu(model: ir.Model) -> None:
    """Both blocks read one constant; one of them gets another."""
    value = ir.val("gelu_factor", ir.DataType.FLOAT, [], const_value=ir.tensor(np.float32(1.6)))
    model.graph.initializers["gelu_factor"] = value
    scaled = [node for node in model.graph if node.op_type == "Sigmoid"][1].inputs[0]
    assert scaled is not None
    product = scaled.producer()
    assert product is not None
    product.replace_input_with(1, value)


def exchange_keys_and_values(model: ir.Model) -> None:
    """Which have the same shape."""
    product = [node for node in model.graph if node.op_type == "MatMul" and reads_softmax(node)][1]
    _, keys, values = [node.outputs[0] for node in model.graph if node.op_type == "Squeeze"][3:6]
    reader = next(use for use in keys.uses())
    assert product.inputs[1] is values
    reader.node.replace_input_with(reader.idx, values)
    product.replace_input_with(1, keys)


def reads_softmax(node: ir.Node) -> bool:
    return any((maker := value.producer()) is not None and maker.op_type == "Softmax" for value in node.inputs if value)


def lose_the_mask(model: ir.Model) -> None:
    scores = next(node for node in model.graph if node.op_type == "Softmax").inputs[0]
    assert scores is not None
    mask = scores.producer()
    assert mask is not None
    assert mask.op_type == "Add"
    assert mask.inputs[0] is not None
    scores.replace_all_uses_with(mask.inputs[0])
    model.graph.remove(mask, safe=True)


def swap_axes(model: ir.Model) -> None:
    node_of(model, "Transpose", 1).attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])


def scale_the_output(model: ir.Model) -> None:
    last = model.graph.outputs[0]
    factor = ir.val("factor", ir.DataType.FLOAT, [], const_value=ir.tensor(np.float32(1.005)))
    model.graph.initializers["factor"] = factor
    node = ir.node("Mul", [last, factor])
    node.outputs[0].name, last.name = last.name, "unscaled"
    node.outputs[0].type, node.outputs[0].shape = last.type, last.shape
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]


def relu_for_sigmoid(model: ir.Model) -> None:
    old = node_of(model, "Sigmoid", 1)
    new = ir.node("Relu", list(old.inputs))
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], old.outputs, new.outputs)


def rename_an_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "tokens"


def halve_a_weight(model: ir.Model) -> None:
    weight = model.graph.initializers["projection"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float16))
    weight.dtype = ir.DataType.FLOAT16
    reader = next(iter(weight.uses())).node
    cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
    model.graph.insert_before(reader, cast)
    reader.replace_input_with(1, cast.outputs[0])


@pytest.mark.parametrize(
    ("change", "section", "where", "what"),
    [
        (flip_a_row, "weights", "blocks.1.mlp.fc1.bias", "1 of 512 values differ"),
        (other_epsilon, "structure", "blocks.0.norm2", "LayerNormalization's epsilon: 1e-05 → 1e-06"),
        (other_quick_gelu, "structure", "blocks.*.mlp (2 places)", "a constant: 1.702 → 1.6"),
        (one_quick_gelu, "structure", "blocks.1.mlp", "a constant: 1.702 → 1.6"),
        (exchange_keys_and_values, "structure", "blocks.1.attn (2 places)", "what "),
        (lose_the_mask, "structure", "blocks.0.attn", "operators: Add → none"),
        (swap_axes, "structure", "blocks.0.attn", "Transpose's perm"),
        (scale_the_output, "structure", "projection", "operators: none → Mul"),
        (relu_for_sigmoid, "structure", "blocks.1.mlp", "operators: Sigmoid → Relu"),
        (rename_an_input, "interface", "", "input 'input_ids'"),
        (halve_a_weight, "structure", "projection", "operators: none → Cast"),
    ],
)
def test_a_changed_graph_is_told_by_its_cause(
    change: Change, section: str, where: str, what: str, demo: Path, tmp_path: Path
) -> None:
    found = changed_graph(demo, tmp_path, change)
    first = found.differences[0]
    assert (first.section, first.where) == (section, where)
    assert what in str(first)
    with pytest.raises(VerificationError):
        found.raise_if_different()


def test_an_epsilon_that_is_next_to_nothing_is_told(demo: Path, tmp_path: Path) -> None:
    model = ir.load(graph_of(demo))
    for node in model.graph:
        if node.op_type == "LayerNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-12)
    ir.save(model, tmp_path / "before.onnx")
    node_of(model, "LayerNormalization", 1).attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-11)
    ir.save(model, tmp_path / "after.onnx")
    first = diff(tmp_path / "before.onnx", tmp_path / "after.onnx").differences[0]
    assert str(first) == "blocks.0.norm2: LayerNormalization's epsilon: 1e-12 → 1e-11"


def test_another_opset_is_told_first(demo: Path, tmp_path: Path) -> None:
    onnx.save(version_converter.convert_version(onnx.load(graph_of(demo)), 21), tmp_path / "later.onnx")
    found = diff(graph_of(demo), tmp_path / "later.onnx")
    assert str(found.differences[0]) == "opset: ai.onnx 18 → ai.onnx 21"


def set_field(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "vlm_export.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def other_mean(data: dict[str, Any]) -> None:
    data["image"]["mean"][0] = 0.5


def other_scale(data: dict[str, Any]) -> None:
    embed: dict[str, Any] = next(task for task in data["tasks"] if task["kind"] == "embed")
    embed["score"]["logit_scale"] = 1.0


def fewer_images(data: dict[str, Any]) -> None:
    vision: dict[str, Any] = next(part for part in data["parts"] if part["name"] == "vision")
    vision["signature"]["axes"][0]["maximum"] = 64


def without_half(data: dict[str, Any]) -> None:
    for part in data["parts"]:
        part["variants"] = part["variants"][:1]


@pytest.mark.parametrize(
    ("change", "section", "where"),
    [
        (other_mean, "preparation", "image.mean[0]"),
        (other_scale, "tasks", "tasks.embed.score.logit_scale"),
        (fewer_images, "interface", "vision axes.batch.maximum"),
        (without_half, "parts", "vision"),
    ],
)
def test_what_the_manifest_says_is_compared(
    change: Callable[[dict[str, Any]], None], section: str, where: str, demo: Path, copied: Path
) -> None:
    set_field(copied, change)
    first = diff(demo, copied).differences[0]
    assert (first.section, first.where) == (section, where)


def test_another_tokenizer_is_told_before_what_follows(
    demo: Path, copied: Path, relist: Callable[[Path], None]
) -> None:
    path = copied / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["merges"] = data["model"]["merges"][:-1]
    path.write_text(json.dumps(data), encoding="utf-8")
    relist(copied)
    first = diff(demo, copied).differences[0]
    assert (first.section, first.where) == ("tokenizer", "tokenizer.json.model.merges")


def test_every_file_beside_the_graphs_is_compared(demo: Path, copied: Path, relist: Callable[[Path], None]) -> None:
    path = copied / "golden" / "contract" / "record.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["texts"][1]["ids"][1] += 1
    path.write_text(json.dumps(data), encoding="utf-8")
    (copied / "chat_template.jinja").write_text("{{ text }}", encoding="utf-8")
    set_field(copied, lambda data: data["files"].update({"chat_template.jinja": {}}))
    relist(copied)
    found = diff(demo, copied).differences
    assert [difference.section for difference in found] == ["files", "contract"]
    assert str(found[0]) == "chat_template.jinja: the file: none → there"


def test_within_a_tolerance_nothing_differs(demo: Path, tmp_path: Path) -> None:
    def nudge(model: ir.Model) -> None:
        weight = model.graph.initializers["projection"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1 + 1e-6))

    exact = changed_graph(demo, tmp_path, nudge)
    assert [difference.section for difference in exact.differences] == ["weights", "outputs"]
    assert diff(graph_of(demo), tmp_path / "changed.onnx", DiffOptions(tolerance=1e-4)).equal


def test_a_graph_and_a_bundle_are_not_compared(demo: Path) -> None:
    with pytest.raises(UsageError, match="a graph is compared with a graph"):
        diff(demo, graph_of(demo))


def test_the_command_prints_and_ends_with_1(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm_export.cli.main import main

    changed_graph(demo, tmp_path, other_epsilon)
    graphs = [str(graph_of(demo)), str(tmp_path / "changed.onnx")]
    assert main(["diff", *graphs, "--json", "--latency"]) == 1
    data: Mapping[str, Any] = json.loads(capsys.readouterr().out)
    assert data["differences"][0]["where"] == "blocks.0.norm2"
    assert {entry["unit"] for entry in data["measured"]} == {"bytes", "ms"}
    assert main(["diff", graphs[0], graphs[0]]) == 0
    assert capsys.readouterr().out.startswith("no difference")


def written(folder: Path, name: str, text: str, **weights: np.ndarray) -> Path:
    """A graph in ONNX's text form, with weights."""
    model = onnx.parser.parse_model(text)
    for weight, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, weight.replace("_", ".")))
    onnx.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


HEAD = '<ir_version: 8, opset_import: ["" : 18]> '
NOISE = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


def branching(product: str) -> str:
    """A graph whose second branch no ordinary input takes."""
    return f"""{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{
        total = ReduceSum <keepdims = 0> (x)
        limit = Constant <value = float {{1000000.0}}> ()
        usual = Less (total, limit)
        y = If (usual) <
            then_branch = usual () => (float[N, 4] a) {{ a = MatMul (x, "first.weight") }},
            else_branch = rare () => (float[N, 4] b) {{ c = MatMul (x, "second.weight")  b = Sub ({product}) }}
        >
    }}"""


def test_what_no_input_reaches_is_compared(tmp_path: Path) -> None:
    sound = written(tmp_path, "sound", branching("c, x"), first_weight=NOISE, second_weight=NOISE.T)
    weight = written(tmp_path, "weight", branching("c, x"), first_weight=NOISE, second_weight=2 * NOISE.T)
    wired = written(tmp_path, "wired", branching("x, c"), first_weight=NOISE, second_weight=NOISE.T)
    assert diff(sound, sound).equal
    assert str(diff(sound, weight).differences[0]).startswith("second.weight: 16 of 16 values differ")
    assert "If's else_branch" in str(diff(sound, wired).differences[0])


def test_a_weight_that_is_an_input_too_is_a_weight(tmp_path: Path) -> None:
    text = HEAD + "g (int64[N] ids, float[4, 4] table) => (float[N, 4] y) { y = Gather (table, ids) }"
    changed = NOISE.copy()
    changed[3, 1] += 1
    left, right = (written(tmp_path, n, text, table=w) for n, w in (("a", NOISE), ("b", changed)))
    assert diff(left, left).equal
    assert str(diff(left, right).differences[0]).startswith("table: 1 of 16 values differ, all in row 3")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("y = Max (x, a, b)", "y = Max (b, x, a)", ""),
        ("y = Add (a, b)", "y = Add (b, a)", ""),
        ("y = Sub (a, b)", "y = Sub (b, a)", "what Sub reads: Tanh of first → Sigmoid of first"),
        (
            "y = Identity (a)  z = Identity (b)",
            "z = Identity (a)  y = Identity (b)",
            "what Identity reads: Tanh of first",
        ),
    ],
)
def test_connections_are_compared(before: str, after: str, told: str, tmp_path: Path) -> None:
    outputs = "float[N, 4] y" + (", float[N, 4] z" if "z" in before else "")
    head = f'{HEAD} g (float[N, 4] x) => ({outputs}) {{ m = MatMul (x, "first.weight")  a = Tanh (m)  b = Sigmoid (m) '
    left, right = (written(tmp_path, n, head + t + " }", first_weight=NOISE) for n, t in (("a", before), ("b", after)))
    found = diff(left, right).differences
    assert found == () if not told else told in str(found[0])


@pytest.mark.parametrize(("before", "after"), [(1.0, 1 + 2.0**-23), (0.0, -0.0)])
def test_a_constant_is_compared_to_its_last_bit(before: float, after: float, tmp_path: Path) -> None:
    text = HEAD + "g (float[N, 4] x) => (float[N, 4] y) { p = Mul (x, x)  y = Div (p, factor) }"
    left, right = (written(tmp_path, n, text, factor=np.float32(v)) for n, v in (("a", before), ("b", after)))
    assert diff(left, right).differences[0].section == "structure"
