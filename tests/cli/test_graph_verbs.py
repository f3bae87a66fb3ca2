"""`vlm-export graph`: each verb on a small model, and what is refused."""

from __future__ import annotations

import errno
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core import inference
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
    cli("graph", "store", a, "-o", weighted, "--overwrite", "--verify", *EXTERNAL).refused(2, text)
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


def test_split_into_two_directories_says_what_is_in_place_where_the_second_refuses(
    cli: Callable[..., Any], weighted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = weighted.with_name("1.onnx"), weighted.parent / "other" / "2.onnx"
    second.parent.mkdir()
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).parent == second.parent:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    split = ("graph", "split", weighted, "--at", "h", "-o", first, "--second", second, "--embedded")
    cli(*split).refused(4, "only some of the models are in place", str(first), "Permission denied")
    assert first.is_file()
    assert not second.exists()
    monkeypatch.undo()
    assert cli(*split, "--overwrite", "--verify").status == 0


def test_split_refuses_what_is_not_valid(
    cli: Callable[..., Any], weighted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = inference.validate, list[str]()

    def validate(model: Any) -> None:
        names = [str(value.name) for value in model.graph.outputs]
        seen.extend(names)
        if model.graph.inputs[0].name == "h":
            raise GraphError("the second is not valid")
        real(model)

    monkeypatch.setattr(inference, "validate", validate)
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


def test_given_inputs(cli: Callable[..., Any], model: Path) -> None:
    feeds, out = model.with_name("in.npz"), model.with_name("out.onnx")
    np.savez(feeds, x=np.ones((2, 4, 6), np.float32), c=np.array(True))
    result = cli("graph", "remove-noops", model, "-o", out, "--verify", "--inputs", feeds)
    assert "2 outputs are equal on 1 sets of inputs" in result.out
    cli("graph", "remove-noops", model, "-o", out, "--overwrite", "--inputs", feeds).refused(2, "add --verify")
    cli("graph", "verify", model, out, "--inputs", model).refused(2, "one .npz file or several .pb files")


def _damaged(folder: Path) -> None:
    """Files that look like .npz and are none."""
    np.savez_compressed(folder / "whole.npz", x=np.arange(1000.0))
    data = (folder / "whole.npz").read_bytes()
    (folder / "whole.npz").unlink()
    (folder / "zlib.npz").write_bytes(data[:200] + bytes(8) + data[208:])
    (folder / "cut.npz").write_bytes(data[:300])
    (folder / "zip.npz").write_bytes(b"PK\x03\x04junk")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "folder.npz").mkdir()
    np.save(folder / "one.npy", np.zeros(2))
    (folder / "one.npy").rename(folder / "one.npz")
    with zipfile.ZipFile(folder / "text.npz", "w") as archive:
        archive.writestr("x", "no array")
    np.savez(folder / "pickle.npz", x=np.array([{}], object))


def test_inputs_that_cannot_be_read(cli: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    _damaged(folder)
    for path in (*sorted(folder.iterdir()), folder / "none.npz"):
        cli("graph", "verify", model, model, "--inputs", path).refused(2, "no .npz of plain arrays", path.name)


@pytest.mark.parametrize(
    ("ends", "axes"), [(",".join(["999999999999"] * 3), "0,1,2"), ("999999999999,9", "0"), ("9", "-3")]
)
def test_a_slice_of_axes_that_are_not_there_is_no_traceback(
    cli: Callable[..., Any], tmp_path: Path, ends: str, axes: str
) -> None:
    starts = ",".join("0" for _ in ends.split(","))
    sizes = (len(starts.split(",")), len(ends.split(",")), len(axes.split(",")))
    weights = "int64[{}] s = {{{}}}, int64[{}] e = {{{}}}, int64[{}] a = {{{}}}"
    values = weights.format(sizes[0], starts, sizes[1], ends, sizes[2], axes)
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[n,3] x) => (float[m,k] y) <{values}> {{ t = Slice(x, s, e, a) y = Neg(t) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    result = cli("graph", "remove-noops", tmp_path / "in.onnx", "-o", tmp_path / "out.onnx")
    assert result.status in (0, 3)
    assert "Traceback" not in result.err


def test_an_axis_where_none_has_a_name(cli: Callable[..., Any], tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(TEXT.replace("batch", "2")), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    result = cli("graph", "set-axis", tmp_path / "in.onnx", "n", "3", "-o", out)
    assert "known" not in result.refused(3, "no input has an axis 'n'", "fix: no input has a named axis").err


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
        (["rename-tensor", "IN", "x=a", "x=b"], 2, ["names names 'x' twice"]),
        (["rename-tensor", "IN", "x=\udcff"], 2, ["names is of another form", "surrogates not allowed"]),
        (["set-axis", "IN", "batch", "-1"], 2, ["a whole number from 0 up"]),
        (["set-axis", "IN", "batch", "1.5"], 2, ["size is of another form"]),
        (["set-axis", "IN", "batch", "99999999999999999999"], 2, ["beyond 64 bits"]),
        (["set-shape", "IN", "x=-1,4,6"], 2, ["a whole number from 0 up"]),
        (["set-shape", "IN", "x=1,,4,6"], 2, ["an axis is missing"]),
        (["set-shape", "IN", "x=99999999999999999999,4,6"], 2, ["beyond 64 bits"]),
        (["set-attribute", "IN", "t0", "perm", "[99999999999999999999, 0, 1]"], 3, ["another type"]),
        (["set-attribute", "IN", "e", "alpha", f"1{'0' * 400}"], 3, ["another type"]),
        (["set-attribute", "IN", "e", "alpha", "(" * 5000], 3, ["another type"]),
        (["delete-attribute", "IN", "i", "to"], 3, ["has no attribute 'to'", "no attributes"]),
        (["convert-opset", "IN", "19.5"], 2, ["version is of another form"]),
        (["add-opset-imports", "IN", "--versions", "d=99999999999999999999"], 2, ["beyond 64 bits"]),
        *(
            (["insert-node", "IN", "Mul", "--after", "y", "--operands", text], 2, ["operands is of another form"])
            for text in (
                "int64:[0, 1",
                "int64:",
                "int64:1.5",
                "int64:[9223372036854775808]",
                "int8:[300]",
                "uint8:[-1]",
                "bool:2",
                "bool:['a']",
                "float32:foo",
                "float16:1e9",
                "int64:[[1], [2, 3]]",
                f"int64:{'[' * 5000}",
            )
        ),
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


@pytest.mark.parametrize("verb", ["show", "find", "check", "verify", "apply", "store", "split", "compose"])
def test_every_verb_describes_itself(cli: Callable[..., Any], verb: str) -> None:
    result = cli("graph", verb, "--help")
    assert result.status == 0
    assert "--json" in result.out
    assert "--quiet" in result.out
