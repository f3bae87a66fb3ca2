"""Damaged files: whatever the bytes, every verb ends with an error that says what is wrong, or does its work."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlm_export.cli.main import main
from vlm_export.graph.verbs import VERBS

# Verb → its arguments; those that write get `-o`.
ARGUMENTS: dict[str, Sequence[str]] = {
    "add-opset-imports": [],
    "add-output": ["b"],
    "cancel-transposes": [],
    "check": [],
    "compose": ["SECOND", "--connect", "y=x", "--prefix-second", "b/"],
    "convert-opset": ["21"],
    "delete-attribute": ["c", "axis"],
    "drop-output": ["z"],
    "extract": ["--to", "y"],
    "find": ["Reshape -> *"],
    "fold-constants": [],
    "infer-shapes": [],
    "insert-node": ["Relu", "--after", "b"],
    "remove-dead-code": [],
    "remove-node": ["r"],
    "remove-noops": [],
    "rename-tensor": ["x=x2"],
    "reorder": ["--output-order", "z", "y"],
    "replace-node": ["r", "Abs"],
    "set-attribute": ["c", "axis", "0"],
    "set-axis": ["N", "2"],
    "set-dtype": ["x=float16"],
    "set-shape": ["x=3,8"],
    "share-initializers": [],
    "share-storage": [],
    "show": [],
    "split": ["--at", "b", "--second", "SECOND_OUT"],
    "static-arguments": [],
    "store": ["--external", "--threshold", "0"],
}
# What only reads.
READING = ("check", "find", "show")

PLAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,8] x) => (float[N,8] y, float[N,8] z)
   <float[8] w = {1,2,3,4,5,6,7,8}, int64[2] s = {-1,8}, float[8] w2 = {1,2,3,4,5,6,7,8}> {
    a = Mul(x, w)
    b = Add(a, w2)
    r = Relu(b)
    f = Reshape(r, s)
    t = Transpose <perm = [1, 0]> (f)
    u = Transpose <perm = [1, 0]> (t)
    c = Concat <axis = 1> (u)
    h = Cast <to = 1> (c)
    k = Constant <value_float = 2.0> ()
    l = Sqrt(k)
    y = Mul(h, l)
    z = Clip(y)
}"""
NESTED = """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
g (float[N,8] x, bool[] flag) => (float[N,8] y, float[N,8] z) {
    b = local.Twice(x)
    r = If (flag) <
        then_branch = g1 () => (float[N,8] o1) { o1 = LeakyRelu <alpha = 0.5> (b) },
        else_branch = g2 () => (float[N,8] o2) { o2 = Neg(b) }>
    c = Softmax <axis = 1> (r)
    m = ReduceMean <keepdims = 1> (c)
    y = Sub(r, m)
    z = Identity(c)
}
<domain: "local", opset_import: ["" : 18]> Twice (p) => (q) { q = Add(p, p) }"""


def _old_model() -> onnx.ModelProto:
    """Of IR version 3, whose weights are inputs, and quantised."""
    weights = [
        numpy_helper.from_array(np.arange(64, dtype=np.int8).reshape(8, 8), "q"),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.array(["a", "b"], dtype=object), "words"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="product"),
        helper.make_node("Clip", ["b"], ["r"], min=-1.0, max=1.0),
        helper.make_node("Concat", ["r", "r"], ["c"], axis=1),
        helper.make_node("Slice", ["c"], ["y"], starts=[0], ends=[8], axes=[1]),
        helper.make_node("Unsqueeze", ["y"], ["v"], axes=[0]),
        helper.make_node("Squeeze", ["v"], ["z"], axes=[0]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])]
    inputs += [helper.make_tensor_value_info(entry.name, entry.data_type, list(entry.dims)) for entry in weights]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("y", "z")]
    graph = helper.make_graph(nodes, "old", inputs, outputs, weights)
    graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["N", 8]))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=3)


MODELS = (onnx.parser.parse_model(PLAIN), onnx.parser.parse_model(NESTED), _old_model())


def _run(verb: str, path: Path) -> tuple[int, str]:
    """Status and stderr of one verb on a file."""
    second, out = path.with_name("second.onnx"), path.with_name("out.onnx")
    if not second.exists():
        second.write_bytes(MODELS[0].SerializeToString())
    words = [{"SECOND": str(second), "SECOND_OUT": str(path.with_name("out2.onnx"))}.get(word, word)
             for word in ARGUMENTS[verb]]  # fmt: skip
    writing = [] if verb in READING else ["-o", str(out), "--overwrite"]
    errors = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(errors):
        status = main(["graph", verb, str(path), *words, *writing])
    return status, errors.getvalue()


def test_every_verb_is_tried() -> None:
    assert ARGUMENTS.keys() - {*READING, "split", "store"} == {verb.name for verb in VERBS}


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_mutated_bytes_never_end_in_a_traceback(tmp_path: Path, verb: str) -> None:
    rng = random.Random(verb)
    path = tmp_path / "in.onnx"
    for number in range(9):
        data = bytearray(MODELS[number % len(MODELS)].SerializeToString())
        for _ in range(rng.choice((1, 1, 2, 3))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 7, 10, 34, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(data)
        status, errors = _run(verb, path)
        assert status in (0, 2, 3), (number, status, errors)
        assert "Traceback" not in errors
        assert errors.isprintable() or all(line.isprintable() for line in errors.splitlines())


def _first_node(model: onnx.ModelProto) -> onnx.NodeProto:
    node: onnx.NodeProto = model.graph.node[0]
    return node


def _name_that_is_no_text(model: onnx.ModelProto) -> bytes:
    _first_node(model).output[0] = "UNIQUE"
    return bytes(model.SerializeToString()).replace(b"UNIQUE", b"UNI\xffUE")


def _operator_that_is_no_text(model: onnx.ModelProto) -> bytes:
    _first_node(model).op_type = "UNIQUE"
    return bytes(model.SerializeToString()).replace(b"UNIQUE", b"UNI\xffUE")


def _edited(edit: Callable[[Any], object]) -> Callable[[onnx.ModelProto], bytes]:
    def damage(model: onnx.ModelProto) -> bytes:
        edit(model.graph)
        return bytes(model.SerializeToString())

    return damage


def _attribute(graph: onnx.GraphProto) -> onnx.AttributeProto:
    found: onnx.AttributeProto = next(node for node in graph.node if node.output[0] == "c").attribute[0]
    return found


def _ragged(graph: onnx.GraphProto) -> None:
    graph.initializer[0].ClearField("float_data")
    graph.initializer[0].raw_data = b"123"


def _holds_no_graph(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("If", ["flag"], ["made"]))
    graph.node[-1].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)


# Kind of damage → what makes it of the plain model, and what the error must name.
DAMAGES: dict[str, tuple[Callable[[onnx.ModelProto], bytes], str]] = {
    "a tensor's name is not UTF-8": (_name_that_is_no_text, "UNI"),
    "an operator's name is not UTF-8": (_operator_that_is_no_text, "'a'"),
    "an attribute has no type": (_edited(lambda graph: _attribute(graph).ClearField("type")), "'axis'"),
    "an attribute has another type": (
        _edited(lambda graph: _attribute(graph).CopyFrom(helper.make_attribute("axis", [1]))),
        "'axis'",
    ),
    "an input has no element type": (
        _edited(lambda graph: graph.input[0].type.tensor_type.ClearField("elem_type")),
        "'x'",
    ),
    "an input has no type": (_edited(lambda graph: graph.input[0].type.Clear()), "'x'"),
    "an unknown dtype": (_edited(lambda graph: setattr(graph.initializer[0], "data_type", 99)), "'w'"),
    "an unknown element type": (
        _edited(lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", 99)),
        "'x'",
    ),
    "a negative size of a weight": (_edited(lambda graph: graph.initializer[0].dims.__setitem__(0, -8)), "'w'"),
    "a negative size of an input": (
        _edited(lambda graph: setattr(graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -8)),
        "'x'",
    ),
    "too few bytes": (_edited(_ragged), "'w'"),
    "a size beyond any memory": (_edited(lambda graph: graph.initializer[0].dims.append(1 << 50)), "'w'"),
    "a name that two nodes make": (_edited(lambda graph: graph.node.append(graph.node[0])), "'a'"),
    "an initializer that a node makes": (_edited(lambda graph: setattr(graph.initializer[0], "name", "a")), "'a'"),
    "a graph that is not there": (_edited(_holds_no_graph), "'then_branch'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_kind_of_damage_is_named_by_every_verb(tmp_path: Path, name: str) -> None:
    damage, named = DAMAGES[name]
    model = onnx.ModelProto()
    model.CopyFrom(MODELS[0])
    path = tmp_path / "in.onnx"
    path.write_bytes(damage(model))
    for verb in ARGUMENTS:
        status, errors = _run(verb, path)
        assert status == 3, (verb, errors)
        assert named in errors, (verb, errors)


def test_a_cycle_is_no_traceback(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(MODELS[0])
    model.graph.node[0].input[1] = "r"
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    for verb in ARGUMENTS:
        status, errors = _run(verb, path)
        assert status in (0, 3), (verb, errors)
