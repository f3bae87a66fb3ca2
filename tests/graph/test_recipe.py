"""Recipes: verbs in order, strict about names and forms."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import UsageError
from vlm_export.graph.prove.prove import prove
from vlm_export.graph.recipe import apply_steps, read_recipe
from vlm_export.graph.verb_arguments import Argument, Kind, read_size, value_from_words
from vlm_export.graph.verbs import VERBS, Verb

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n,3,4] x) => (float[n,3,4] y) {
    a = Transpose<perm=[0,2,1]>(x)
    b = Relu(a)
    c = Transpose<perm=[0,2,1]>(b)
    d = Identity(c)
    y = Abs(d)
}"""
RECIPE = """
- cancel-transposes
- remove-noops:
- rename-tensor: {names: {x: pixels, y: features}}
- insert-node: {op_type: Add, after: pixels, operands: ["float32:[1, 1, 1, 1]"], output_name: shifted}
- insert-node:
    op_type: Sub
    after: shifted
    operands: ["float32:1"]
- set-shape:
    shapes: {pixels: [2, 3, 4]}
- extract: {to: features}
"""


@pytest.fixture
def model() -> ir.Model:
    found: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)))
    return found


def test_verbs_in_order(model: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    original = model.clone()
    applied = apply_steps(model, read_recipe(path))
    assert [node.op_type for node in applied.model.graph] == ["Add", "Sub", "Relu", "Abs"]
    assert applied.results[:2] == [2, {"Identity": 1}]
    assert applied.renamed == {"pixels": "x", "features": "y"}
    assert list(applied.model.graph.inputs[0].shape or ()) == [2, 3, 4]
    proof = prove(original, applied.model, renamed=applied.renamed, tolerance=1e-6)
    assert proof.outputs == ("features",)


def test_names_are_followed_through_several_steps(model: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- rename-tensor: {names: {x: a1, y: b1}}\n- rename-tensor: {names: {a1: b1, b1: a1}}\n")
    assert apply_steps(model, read_recipe(path)).renamed == {"b1": "x", "a1": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cancel-transposes", "a recipe is a list of verbs"),
        ("[]", "a recipe is a list of verbs"),
        ("- [a", "the recipe is not YAML"),
        ("- cancel-transpose", "did you mean 'cancel-transposes'"),
        ("- rename-tensor: {name: {x: z}}", "did you mean 'names'"),
        ("- rename-tensor: {names: x}", "names is of another form"),
        ("- rename-tensor", "rename-tensor lacks arguments"),
        ("- rename-tensor: x", "takes a mapping"),
        ("- {extract: {to: [y]}, remove-noops: }", "a step is one verb"),
        ("- convert-opset: {version: soon}", "version is of another form"),
        ("- fold-constants: {limit: 3 parsecs}", "a size is a number with"),
        ("- convert-opset: {version: .inf}", "version is of another form"),
        ("- convert-opset: {version: 19.9}", "version is of another form"),
        ("- convert-opset: {version: 99999999999999999999}", "beyond 64 bits"),
        ("- convert-opset: {version: 2001-99-99}", "the recipe is not YAML"),
        ("- convert-opset: {version: !!int ''}", "the recipe is not YAML"),
        ("- set-axis: {axis: b, size: 1.5}", "size is of another form"),
        ("- set-axis: {axis: b, size: yes}", "size is of another form"),
        ("- set-axis: {axis: b, size: -1}", "a whole number from 0 up"),
        ("- set-shape: {shapes: {x: {a: b}}}", "shapes is of another form"),
        ("- rename-tensor: {names: {x: z, x: q}}", "key 'x' stands twice"),
        ("- rename-tensor: {names: {x: z}, names: {y: q}}", "key 'names' stands twice"),
        ("- ? [1, 2]\n  : 3", "the recipe is not YAML"),
        (f"- {'[' * 2000}", "the recipe is not YAML"),
    ],
)
def test_mistakes_are_named_with_the_step(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert "recipe.yaml" in caught.value.where


def test_keys_that_are_merged_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- insert-node: &first {op_type: Relu, after: x}\n- insert-node: {<<: *first, after: y}\n")
    assert [step.values["after"] for step in read_recipe(path)] == ["x", "y"]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_table_fits_the_functions(verb: Verb) -> None:
    module, _, name = verb.function.partition(":")
    function = getattr(import_module(f"vlm_export.graph.{module}"), name)
    parameters = list(signature(function).parameters.values())
    for argument in verb.arguments:
        (parameter,) = [entry for entry in parameters[1:] if entry.name == argument.target]
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    required = {entry.name for entry in parameters[1:] if entry.default is entry.empty}
    known = {argument.target: argument for argument in verb.arguments}
    assert required <= known.keys()
    # Extraction from the model's own inputs is what no --from means.
    assert all(known[name].must_be_given for name in required - {"inputs"})


def _read(kind: Kind, *words: str) -> Any:
    argument = Argument("it", kind, "")
    return value_from_words(argument, words if argument.takes_several else words[0])


def test_forms_of_arguments() -> None:
    shapes = ["1,3,h", "(3,)", "", "[2, ?]", "2_x, b+1"]
    expected = [[1, 3, "h"], [3], [], [2, None], ["2_x", "b+1"]]
    assert [_read("shapes", f"x={text}")["x"] for text in shapes] == expected
    texts = ["int64:[]", "int64:[0, -1]", "bool:[True, 0]", "float16:65504", "float32:1", "float64:[[1], [1e400]]"]
    values = [[], [0, -1], [True, False], 65504, 1, [[1], [float("inf")]]]
    arrays = _read("operands", *texts)
    assert [array.tolist() for array in arrays] == values
    assert [array.dtype.name for array in arrays] == [text.partition(":")[0] for text in texts]
    assert _read("operands", "name", "", "a:b") == ["name", None, "a:b"]
    assert [_read("value", text) for text in ("[1, 2]", "(1,0", "{[]: 1}", "1e3")] == [[1, 2], "(1,0", "{[]: 1}", 1e3]
    assert [_read("axis", text) for text in ("12", "n", "?")] == [12, "n", None]


def test_sizes() -> None:
    assert [read_size(text) for text in ("1000", "64MiB", "2 GB", "1kb", 5)] == [1000, 64 << 20, 2 * 10**9, 1000, 5]
    with pytest.raises(ValueError, match="a size is"):
        read_size("2 parsecs")
