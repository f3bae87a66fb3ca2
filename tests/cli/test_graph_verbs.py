"""`vlm-export graph`: each verb on a small model, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from vlm_export.graph import checks
from vlm_export.graph.errors import GraphError
from vlm_export.graph.verbs import VERBS

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[batch,4,6] x, bool c) => (float[batch,4,6] y, float[batch,6,4] t)
    <float[6] b = {1,-2,3,-4,5,-6}, float[6] b2 = {1,2,3,4,5,6}> {
    t0 = Transpose<perm=[0,2,1]>(x)
    r = Relu(t0)
    t1 = Transpose<perm=[0,2,1]>(r)
    i = Identity(t1)
    [add] s = Add(i, b)
    z = If (c) <then_branch = g1 () => (float[batch,4,6] u) { u = Mul(s, b2) },
                else_branch = g2 () => (float[batch,4,6] e) { e = LeakyRelu<alpha=0.5>(s) }>
    y = Cast<to=1>(z)
    t = Transpose<perm=[0,2,1]>(i)
}"""
# Verb → arguments after IN, and operators that it leaves or adds; the proof must hold.
SAME = {
    "cancel-transposes": [],
    "remove-noops": [],
    "static-arguments": [],
    "fold-constants": ["--limit", "1MB"],
    "remove-dead-code": [],
    "share-initializers": [],
    "share-storage": [],
    "infer-shapes": [],
    "convert-opset": ["21"],
    "add-opset-imports": ["--versions", "acme=2"],
    "remove-node": ["i"],
    "insert-node": ["Identity", "--after", "add", "--name", "tap", "--output-name", "tapped"],
    "replace-node": ["r", "Max", "--operands", "t0", "float32:0"],
    "set-attribute": ["t0", "perm", "[0, 2, 1]"],
    "rename-tensor": ["x=c", "c=x", "y=result", "s=inner"],
    "set-shape": ["x=2,4,6"],
    "set-axis": ["batch", "3"],
    "set-dtype": ["x=float16", "y=float16"],
    "add-output": ["s", "r"],
    "drop-output": ["t"],
    "reorder": ["--output-order", "t", "y"],
    "extract": ["--from", "r", "--to", "s", "t"],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)), path)
    return path


@pytest.mark.parametrize("verb", SAME)
def test_verbs_prove_themselves(cli: Callable[..., Any], model: Path, verb: str) -> None:
    out = model.with_name("out.onnx")
    result = cli("graph", verb, model, *SAME[verb], "-o", out, "--verify", "--json")
    assert result.status == 0, result.err
    assert result.data["steps"][0]["verb"] == verb
    assert result.data["files"] == [str(out)]
    assert result.data["proof"]["runs"] >= 1
    onnx.checker.check_model(out, full_check=True)


def test_every_verb_of_the_table_is_tried() -> None:
    # Those two change what is computed, or need a second model: they have tests of their own.
    assert {verb.name for verb in VERBS} == SAME.keys() | {"delete-attribute", "compose"}


def test_a_verb_that_changes_the_results_writes_nothing(cli: Callable[..., Any], model: Path) -> None:
    out = model.with_name("out.onnx")
    arguments = ["graph", "set-attribute", model, "e", "alpha", "0.75", "-o", out]
    cli(*arguments, "--verify").refused(1, "output 'y' differs", "nothing was written")
    assert sorted(path.name for path in model.parent.iterdir()) == ["in.onnx"]
    failed = cli(*arguments, "--verify", "--json")
    assert failed.data["error"] == "verification"
    assert cli(*arguments).status == 0
    assert cli("graph", "delete-attribute", out, "e", "alpha", "-o", out, "--overwrite").status == 0
    node = onnx.load(out).graph.node[5].attribute[1].g.node[0]
    assert (node.op_type, len(node.attribute)) == ("LeakyRelu", 0)


def test_split_and_compose(cli: Callable[..., Any], model: Path) -> None:
    first, second, whole = (model.with_name(f"{name}.onnx") for name in ("first", "second", "whole"))
    result = cli("graph", "split", model, "--at", "i", "-o", first, "--second", second, "--verify")
    assert result.status == 0, result.err
    assert "verified" in result.out
    result = cli("graph", "compose", first, second, "--connect", "i=i", "-o", whole, "--verify", "--json")
    assert result.status == 0, result.err
    assert result.data["proof"]["outputs"] == ["y", "t"]
    assert cli("graph", "verify", model, whole).status == 0
    prefixed = ["--prefix-first", "a/", "--prefix-second", "b/"]
    result = cli(
        "graph", "compose", first, second, "--connect", "i=i", *prefixed, "-o", whole, "--overwrite", "--verify"
    )
    assert result.status == 0, result.err
    assert [entry.name for entry in onnx.load(whole).graph.output] == ["b/y", "b/t"]


def test_recipe(cli: Callable[..., Any], model: Path) -> None:
    recipe, out = model.with_name("recipe.yaml"), model.with_name("out.onnx")
    recipe.write_text("- cancel-transposes\n- remove-noops\n- rename-tensor: {names: {x: pixels}}\n", encoding="utf-8")
    result = cli("graph", "apply", model, recipe, "-o", out, "--verify")
    assert result.status == 0, result.err
    assert result.out.splitlines()[:2] == ["cancel-transposes: 2", "remove-noops: Cast 1, Identity 1"]
    recipe.write_text("- cancel-transpose\n", encoding="utf-8")
    cli("graph", "apply", model, recipe, "-o", out, "--overwrite").refused(2, "step 1", "did you mean")


def test_storage(cli: Callable[..., Any], model: Path) -> None:
    out = model.with_name("out.onnx")
    result = cli("graph", "store", model, "-o", out, "--external", "--threshold", "0", "--shard-size", "30", "--json")
    assert [Path(name).name for name in result.data["files"]] == ["out.onnx", "out.onnx_data", "out.onnx_data_1"]
    assert cli("graph", "verify", model, out).status == 0
    cli("graph", "store", out, "-o", out, "--embedded").refused(2, "the output exists")
    assert cli("graph", "store", out, "-o", model.with_name("again.onnx"), "--embedded").status == 0
    cli("graph", "store", out, "-o", "x.onnx", "--shard-size", "big").refused(2, "--shard-size is no size")
    cli("graph", "store", out, "-o", "x.onnx", "--embedded", "--shard-size", "1GB").refused(2, "no shards")


WEIGHTED = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n,2] x) => (float[n,2] y) <float[2] w1 = {1,2}, float[2] w2 = {3,4}> { h = Mul(x, w1) y = Add(h, w2) }"""
EXTERNAL = ["--external", "--threshold", "0"]


@pytest.fixture
def weighted(cli: Callable[..., Any], tmp_path: Path) -> Path:
    """A model with its weights beside it."""
    onnx.save(onnx.parser.parse_model(WEIGHTED), tmp_path / "in.onnx")
    assert cli("graph", "store", tmp_path / "in.onnx", "-o", tmp_path / "b.onnx", *EXTERNAL).status == 0
    (tmp_path / "in.onnx").unlink()
    return tmp_path / "b.onnx"


def test_small_weights_beside_a_graph_are_found_from_anywhere(cli: Callable[..., Any], weighted: Path) -> None:
    assert cli("graph", "check", weighted).out == "valid\n"
    result = cli("graph", "rename-tensor", weighted, "h=k", "-o", weighted.with_name("c.onnx"))
    assert (result.status, result.err) == (0, "")


def test_weights_that_an_input_reads_are_kept(cli: Callable[..., Any], weighted: Path) -> None:
    a, data = weighted.with_name("a.onnx"), weighted.with_name("b.onnx_data")
    a.write_bytes(weighted.read_bytes())
    before = {file: file.read_bytes() for file in weighted.parent.iterdir()}
    text = "weights that an input reads"
    cut = ["graph", "extract", a, "--from", "h", "--to", "y", "--overwrite", *EXTERNAL]
    cli(*cut, "-o", weighted).refused(2, text, "a.onnx reads tensor 'w1' there")
    cli("graph", "rename-tensor", weighted, "h=k", "-o", data, "--overwrite").refused(2, text)
    split = ["graph", "split", a, "--at", "h", "-o", weighted, "--second", weighted.with_name("c.onnx")]
    cli(*split, "--overwrite", *EXTERNAL).refused(2, text)
    compose = ["graph", "compose", a, weighted, "--connect", "y=x", "--prefix-second", "2/", "--overwrite"]
    cli(*compose, "-o", weighted, *EXTERNAL).refused(2, text)
    assert {file: file.read_bytes() for file in weighted.parent.iterdir()} == before
    assert cli(*cut, "-o", a).status == 0


def test_split_writes_both_models_or_none(cli: Callable[..., Any], weighted: Path) -> None:
    first, second, data = (weighted.with_name(name) for name in ("1.onnx", "2.onnx", "2.onnx_data"))
    data.write_text("precious")
    before = {file: file.read_bytes() for file in weighted.parent.iterdir()}
    split = ["graph", "split", weighted, "--at", "h", "-o", first, *EXTERNAL, "--second"]
    cli(*split, second).refused(2, "2.onnx_data", "the output exists")
    cli(*split, weighted.with_name("1.onnx_data"), "--overwrite").refused(2, "two files would have the same name")
    assert {file: file.read_bytes() for file in weighted.parent.iterdir()} == before
    assert len(cli(*split, second, "--overwrite", "--verify", "--json").data["files"]) == 4


def test_split_refuses_what_is_not_valid(
    cli: Callable[..., Any], weighted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = checks.validate, list[str]()

    def validate(model: Any) -> None:
        names = [str(value.name) for value in model.graph.outputs]
        seen.extend(names)
        if model.graph.inputs[0].name == "h":
            raise GraphError("the second is not valid")
        real(model)

    monkeypatch.setattr(checks, "validate", validate)
    split = ["graph", "split", weighted, "--at", "h", "-o", weighted.with_name("1.onnx"), "--second"]
    cli(*split, weighted.with_name("2.onnx")).refused(3, "the second is not valid")
    assert seen == ["h", "y", "y"]
    assert not weighted.with_name("1.onnx").exists()


def test_looking(cli: Callable[..., Any], model: Path) -> None:
    assert cli("graph", "check", model).out == "valid\n"
    shown = cli("graph", "show", model)
    assert "operators: Transpose 3" in shown.out
    assert cli("graph", "show", model, "--json").data["inputs"][0]["shape"] == ["batch", 4, 6]
    assert cli("graph", "find", model, "Transpose -> Relu").out == "Transpose t0 -> Relu r\n1 found\n"
    assert cli("graph", "find", model, "Relu", "--json").data["matches"][0][0]["inputs"] == ["t0"]
    picture = model.with_name("part.svg")
    assert cli("graph", "draw", model, "--from", "x", "--to", "s", "-o", picture).status == 0
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    cli("graph", "draw", model, "-o", picture).refused(2, "the output exists", "--overwrite")
    cli("graph", "draw", model, "-o", "part.png").refused(2, "an .svg file")


def test_given_inputs(cli: Callable[..., Any], model: Path) -> None:
    feeds, out = model.with_name("in.npz"), model.with_name("out.onnx")
    np.savez(feeds, x=np.ones((2, 4, 6), np.float32), c=np.array(True))
    result = cli("graph", "remove-noops", model, "-o", out, "--verify", "--inputs", feeds)
    assert "2 outputs are equal on 1 sets of inputs" in result.out
    cli("graph", "remove-noops", model, "-o", out, "--overwrite", "--inputs", feeds).refused(2, "add --verify")
    cli("graph", "verify", model, out, "--inputs", model).refused(2, "one .npz file or several .pb files")


@pytest.mark.parametrize(
    ("arguments", "status", "texts"),
    [
        (["rename-tensor", "IN", "xx=a"], 3, ["no tensor 'xx'", "did you mean 'x'"]),
        (["rename-tensor", "IN", "x"], 2, ["names is given as NAME=VALUE"]),
        (["set-dtype", "IN", "x=flot16"], 3, ["did you mean 'float16'"]),
        (["remove-node", "nothing.onnx", "i"], 3, ["does not exist"]),
        (["remove-node", "IN", "ii"], 3, ["did you mean 'i'"]),
        (["convert-opset", "IN", "900"], 3, ["there is no such opset"]),
        (["find", "IN", "Relu["], 3, ["the pattern is malformed"]),
        (["insert-node", "IN", "Relu"], 2, ["after", "before"]),
    ],
)
def test_mistakes(cli: Callable[..., Any], model: Path, arguments: list[str], status: int, texts: list[str]) -> None:
    words = [str(model) if word == "IN" else word for word in arguments]
    output = [] if words[0] == "find" else ["-o", model.with_name("out.onnx")]
    cli("graph", *words, *output).refused(status, *texts)
    assert sorted(path.name for path in model.parent.iterdir()) == ["in.onnx"]


def test_a_file_that_is_no_model(cli: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "page.onnx"
    page.write_text("<!DOCTYPE html>")
    cli("graph", "show", page).refused(3, "not an ONNX model", "<!DOCTYPE html>")


def test_help_of_graph_imports_nothing_heavy(spawn: Callable[..., Any]) -> None:
    heavy = ("numpy", "onnx", "onnx_ir", "onnxruntime", "yaml")
    code = f"import atexit\natexit.register(lambda: print('imported', *[m for m in {heavy} if m in sys.modules]))"
    for arguments in (["graph", "--help"], ["graph", "rename-tensor", "--help"]):
        assert spawn(*arguments, code=code).out.splitlines()[-1] == "imported"
    assert "vlm_export.graph.verbs" in sys.modules


@pytest.mark.parametrize("verb", ["show", "find", "draw", "check", "verify", "apply", "store", "split", "compose"])
def test_every_verb_describes_itself(cli: Callable[..., Any], verb: str) -> None:
    result = cli("graph", verb, "--help")
    assert result.status == 0
    assert "--json" in result.out
    assert "--quiet" in result.out
