"""What single passes do and refuse, on small graphs in ONNX's text form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.dead_code import DeadCode, remove_dead_code
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.graph.look.show import describe_model
from vlm_export.graph.passes.convert_opset import convert_opset
from vlm_export.graph.passes.infer_shapes import infer_shapes
from vlm_export.graph.passes.opset_imports import add_opset_imports
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.graph.passes.share_initializers import share_initializers, share_stored_weights
from vlm_export.graph.passes.static_arguments import make_arguments_static

Parse = Callable[[str, Mapping[str, Any]], ir.Model]
Operators = Callable[[ir.Model], list[str]]


@pytest.mark.parametrize(
    ("statement", "weights"),
    [
        ("y = Reshape(a, s)", {"s": [0, 0, 6]}),
        ("y = Reshape(a, s)", {"s": [0, 4, -1]}),
        ("y = Reshape(a, s)", {"s": [-1, 4, 6]}),
        ("y = Cast<to=1>(a)", {}),
        ("y = CastLike(a, x)", {}),
        ("y = Dropout(a)", {}),
        ("y = Expand(a, s)", {"s": [1, 4, 1]}),
        ("y = Slice(a, zero, end, axis)", {"zero": [0], "end": [9223372036854775807], "axis": [0]}),
        ("y = Slice(a, zero, end, axis)", {"zero": [0], "end": [4], "axis": [1]}),
        ("y = Pad(a, pads)", {"pads": [0, 0, 0, 0, 0, 0]}),
        ("y = Tile(a, ones)", {"ones": [1, 1, 1]}),
        ("b = Unsqueeze(a, axes)\n y = Squeeze(b, axes)", {"axes": [1]}),
        ("y = Transpose<perm=[0,1,2]>(a)", {}),
        ("y = Concat<axis=1>(a)", {}),
        ("y = Sum(a)", {}),
    ],
)
def test_noops_go(parse: Parse, operators: Operators, statement: str, weights: Mapping[str, list[int]]) -> None:
    arrays = {name: np.array(value, np.int64) for name, value in weights.items()}
    model = parse(f"g (float[n,4,6] x) => (float[n,4,6] y) {{ a = Relu(x)\n {statement} }}", arrays)
    assert remove_noops(model)
    assert operators(model) == ["Relu"]
    assert model.graph.outputs[0].name == "y"
    assert not model.graph.initializers
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("statement", "weights"),
    [
        # The first axis may have any size.
        ("y = Reshape(a, s)", {"s": [2, 4, 6]}),
        ("y = Reshape(a, s)", {"s": [-1, 6, 4]}),
        ("y = Reshape<allowzero=1>(a, s)", {"s": [0, 4, 6]}),
        ("y = Expand(a, s)", {"s": [3, 1, 1]}),
        ("b = Cast<to=11>(a)\n y = Cast<to=1>(b)", {}),
        ("y, mask = Dropout(a)\n z = Not(mask)", {}),
        ("y = Slice(a, zero, end, axis)", {"zero": [0], "end": [3], "axis": [1]}),
        ("y = Slice(a, zero, end, axis)", {"zero": [0], "end": [100], "axis": [0]}),
        ("y = Slice(a, zero, end, axis, step)", {"zero": [0], "end": [2147483647], "axis": [1], "step": [2]}),
        ("b = Unsqueeze(a, axes)\n y = Squeeze(b, other)", {"axes": [1], "other": [0]}),
        ("y = Pad(a, pads)", {"pads": [0, 0, 0, 0, 0, 1]}),
        # No valid model, but none to stumble over.
        ("y = Slice(a, zero, end, axis)", {"zero": [0], "end": [100], "axis": [3]}),
        ("y = Slice(a, zero, end)", {"zero": [0], "end": [6, 6]}),
    ],
)
def test_what_is_not_proven_stays(
    parse: Parse, operators: Operators, statement: str, weights: Mapping[str, list[int]]
) -> None:
    arrays = {name: np.array(value, np.int64) for name, value in weights.items()}
    extra = ", bool[n,4,6] z" if "mask" in statement else ""
    model = parse(f"g (float[n,4,6] x) => (float[i,j,k] y{extra}) {{ a = Relu(x)\n {statement} }}", arrays)
    before = operators(model)
    assert not remove_noops(model)
    assert operators(model) == before


def test_names_of_the_interface_stay(parse: Parse, operators: Operators) -> None:
    text = """g (float[n] x) => (float[n] y, float[n] z, float[n] w) {
        y = Identity(x)
        a = Relu(x)
        z = Identity(a)
        w = Identity(a)
    }"""
    model = parse(text, {})
    assert remove_noops(model) == {"Identity": 1}
    assert operators(model) == ["Identity", "Relu", "Identity"]
    assert [value.name for value in model.graph.outputs] == ["y", "z", "w"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_default_that_callers_can_override_is_no_constant(parse: Parse) -> None:
    model = parse("g (float[2,3] x, int64[2] s) => (float[i,j] y) { y = Reshape(x, s) }", {"s": np.array([2, 3])})
    assert not remove_noops(model)
    assert not make_arguments_static(model)


def test_arguments_become_static(parse: Parse, operators: Operators) -> None:
    text = """g (float[n,4,6] x) => (float[i,j,k] y, float[p,q] z) {
        s = Shape(x)
        b = Gather(s, zero)
        r = Concat<axis=0>(b, two, minus)
        y = Reshape(x, r)
        h = Gather(s, one)
        hh = Mul(h, one)
        f = Concat<axis=0>(minus, hh)
        z = Reshape(x, f)
    }"""
    weights = {name: np.array([value]) for name, value in (("zero", 0), ("one", 1), ("two", 2), ("minus", -1))}
    model = parse(text, weights)
    assert make_arguments_static(model) == 2
    assert operators(model) == ["Reshape", "Reshape"]
    values = [node.inputs[1] for node in model.graph]
    tensors = [value.const_value.numpy().tolist() for value in values if value and value.const_value is not None]
    assert tensors == [[0, 2, -1], [-1, 4]]
    assert make_arguments_static(model) == 0


def test_an_argument_that_no_constant_decides_stays(parse: Parse) -> None:
    text = """g (float[n,4] x, float[m,4] z) => (float[i,j] y) {
        s = Shape(z)
        b = Gather(s, zero)
        r = Concat<axis=0>(b, four)
        y = Expand(x, r)
    }"""
    assert make_arguments_static(parse(text, {"zero": np.array([0]), "four": np.array([4])})) == 0


def test_dead_code_behind_a_dead_if_goes_too() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
    g (float[n] x, bool c) => (float[n] y) <float[1] w = {1.0}> {
        a = Exp(x)
        z = If (c) <then_branch = t () => (float[n] p) { p = Add(a, w) }, else_branch = e () => (float[n] q)
            <float[1] k = {2.0}, float[1] unused = {3.0}> { d = Neg(a) q = local.same(x) }>
        y = Relu(x)
    }
    <domain: "local", opset_import: ["" : 18]> same (a) => (b) { b = Identity(a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    found = remove_dead_code(model)
    assert (found.nodes, found.initializers, found.functions) == (3, 1, 1)
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert remove_dead_code(model) == DeadCode(0, 0, 0)


def test_equal_initializers_are_shared_with_inner_graphs(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[3] x, bool c) => (float[3] y, float[3] v)
        <float[3] a = {1,2,3}, float[3] b = {1,2,3}, float[3] v = {1,2,3},
        double[3] d = {1,2,3}, float[1,3] e = {1,2,3}> {
        s = Add(a, b)
        r = Add(s, e)
        y = If (c) <then_branch = t () => (float[3] p) <float[3] k = {1,2,3}> { p = Mul(k, x) },
                    else_branch = f () => (float[3] q) <float[3] a2 = {3,2,1}> { q = Mul(a2, x) }>
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert share_initializers(model) == 2
    assert sorted(model.graph.initializers) == ["a", "d", "e", "v"]
    assert share_initializers(model) == 0
    onnx.checker.check_model(ir.to_proto(model))


def test_negative_zero_is_not_zero(parse: Parse) -> None:
    weights = {"a": np.zeros(4, np.float32), "b": -np.zeros(4, np.float32)}
    model = parse("g (float[4] x) => (float[4] y) { s = Add(x, a)\n y = Add(s, b) }", weights)
    assert share_initializers(model) == 0


def test_equal_weights_are_stored_once(parse: Parse, tmp_path: Path) -> None:
    big = np.arange(4096, dtype=np.float32)
    model = parse(
        "g (float[4096] x) => (float[4096] y) { s = Add(x, a)\n t = Add(s, b)\n y = Mul(t, c) }",
        {"a": big, "b": big.copy(), "c": big + 1},
    )
    assert share_stored_weights(model) == big.nbytes
    assert share_stored_weights(model) == 0
    save_model(model, tmp_path / "m.onnx", storage=Storage(external=True))
    opened = open_model(tmp_path / "m.onnx")
    assert describe_model(opened)["weights"]["external_bytes"] == 2 * big.nbytes
    assert sorted(opened.graph.initializers) == ["a", "b", "c"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".onnx") == 2 * big.nbytes


def test_inference_keeps_what_it_cannot_tell() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1, "acme" : 1]>
    g (float[batch,8] x) => (float[batch,8] y) <float[rows,8] b> {
        a = acme.Thing(x)
        b = acme.Other(a)
        c = com.microsoft.FastGelu(b)
        y = Relu(c)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    found = infer_shapes(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert values["a"].type is None
    assert values["b"].shape == ir.Shape(["rows", 8])
    assert values["c"].shape == ir.Shape(["rows", 8])
    assert values["c"].dtype == ir.DataType.FLOAT
    assert (found.dtypes, found.shapes) == (1, 1)
    assert not infer_shapes(model)


def test_inference_that_fails_as_a_whole_says_why() -> None:
    text = """<ir_version: 10, opset_import: ["acme" : 1]>
    g (float[2] x) => (float[2] y) { a = Relu(x)\n y = Relu(a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    before = str(ir.to_proto(model))
    found = infer_shapes(model)
    assert not found
    assert found.failure is not None
    assert "No opset import" in found.failure
    assert str(ir.to_proto(model)) == before


def test_operators_that_cannot_be_converted_are_named() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[4] x) => (float[4] y) { a = Relu(x)\n y = Gelu(a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    before = str(ir.to_proto(model))
    with pytest.raises(GraphError, match="operator Gelu cannot be converted from opset 20 to 18"):
        convert_opset(model, 18)
    assert str(ir.to_proto(model)) == before
    with pytest.raises(GraphError, match="no such opset"):
        convert_opset(model, 400)


def test_conversion_keeps_names_functions_and_metadata() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[n,4] x, bool c) => (float[n,1] y) {
        a = local.mean(x)
        y = If (c) <then_branch = t () => (float[n,1] p) { p = ReduceMean<axes=[1]>(x) },
                    else_branch = e () => (float[n,1] q) { q = Identity(a) }>
    }
    <domain: "local", opset_import: ["" : 17]> mean (v) => (m) { m = ReduceMean<axes=[1]>(v) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    model.metadata_props["kept"] = "yes"
    assert convert_opset(model, 18) == 2
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.functions[0].opset_import] == [18]
    assert [node.op_type for node in proto.functions[0].node] == ["Constant", "ReduceMean"]
    assert proto.graph.node[-1].output == ["y"]
    assert proto.metadata_props[0].value == "yes"
    # And back: the axes are constants, which the older form states as an attribute.
    assert convert_opset(model, 17) == 2
    assert [node.op_type for node in model.graph] == [["local", "mean"][1], "If"]


def test_missing_imports_are_added() -> None:
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    info = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))
    assert add_opset_imports(model) == {"com.microsoft": 1}
    assert add_opset_imports(model) == {}
    assert add_opset_imports(model, {"acme": 3}) == {"acme": 3}
    assert model.opset_imports == {"": 18, "com.microsoft": 1, "acme": 3}
