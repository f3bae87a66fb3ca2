"""Constants that hold the old size of an axis: repaired, so that several at once are as each is alone, or named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from vlm_export.errors import GraphError, VerificationError
from vlm_export.graph.edits.shapes import set_axis, set_shape
from vlm_export.graph.prove.match_interfaces import AxisOfInput, Resized
from vlm_export.graph.prove.prove import prove

Array = npt.NDArray[Any]


def _model(text: str, opset: int = 17, **weights: Array) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\ng {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def _run(model: ir.Model, *arrays: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return list(session.run(None, dict(zip(names, arrays, strict=True))))


def _weights(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


RESHAPE = "(float[1,4,4,4] x) => (float[1,5] y) { f = Reshape(x, s)\n y = MatMul(f, w) }"
ATTENTION = """(float[1,5,8] x) => (float[1,5,8] y) {
    t = Transpose <perm = [1, 0, 2]> (x)
    q = Reshape(t, to_heads)
    h = Transpose <perm = [1, 0, 2]> (q)
    k = Transpose <perm = [0, 2, 1]> (h)
    a = MatMul(h, k)
    p = Softmax <axis = -1> (a)
    o = MatMul(p, h)
    b = Transpose <perm = [1, 0, 2]> (o)
    m = Reshape(b, flat)
    l = MatMul(m, w)
    r = Reshape(l, back)
    y = Transpose <perm = [1, 0, 2]> (r)
}"""
CLASS_TOKEN = """(float[1,3,4,4] x) => (float[1,4] y) {
    p = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, w)
    f = Reshape(p, flat)
    t = Transpose <perm = [0, 2, 1]> (f)
    c = Expand(token, one)
    j = Concat <axis = 1> (c, t)
    s = Slice(j, start, end, first)
    y = Gather <axis = 1> (s, zero)
}"""
RECURRENT = """(float[7,1,4] x) => (float[7,1,3] y) {
    a, b, c = LSTM <hidden_size = 3> (x, w, r, , , state, state)
    y = Squeeze(a, one)
}"""
RESIZED = """(float[1,2,3,3] x) => (float[1,32] y) {
    u = Resize <mode = "linear"> (x, , , sizes)
    y = Reshape(u, flat)
}"""
FILLED = """(float[1,4] x) => (float[1,6] y) <int64[2] s = {1, 2}> {
    z = ConstantOfShape(s)
    y = Concat <axis = 1> (x, z)
}"""
# Shapes that are computed, but for the batch, which is a constant.
COMPUTED = """(float[1,6,4] x) => (float[1,24] y) <int64[1] one = {1}, int64[1] both = {-1}> {
    t = Concat <axis = 0> (one, both)
    y = Reshape(x, t)
}"""

REPAIRED: dict[str, tuple[ir.Model, int]] = {
    "reshape": (_model(RESHAPE, s=_ints(1, 64), w=_weights(64, 5)), 1),
    "flatten": (_model(RESHAPE, s=_ints(1, -1), w=_weights(64, 5)), 1),
    "attention": (
        _model(ATTENTION, to_heads=_ints(5, 2, 4), flat=_ints(5, 8), back=_ints(5, 1, 8), w=_weights(8, 8)), 3,
    ),
    "class token": (
        _model(
            CLASS_TOKEN, w=_weights(4, 3, 2, 2), flat=_ints(1, 4, -1), token=_weights(1, 1, 4), one=_ints(1, 1, 4),
            start=_ints(0, 0), end=_ints(1, 9), first=_ints(0, 1), zero=np.array(0),
        ), 3,
    ),
    "recurrent": (
        _model(RECURRENT, w=_weights(1, 12, 4), r=_weights(1, 12, 3), state=_weights(1, 1, 3), one=_ints(1)), 2,
    ),
    "resized": (_model(RESIZED, sizes=_ints(1, 2, 4, 4), flat=_ints(1, 32)), 2),
    "filled": (_model(FILLED), 1),
    "repeated": (
        _model(
            "(float[1,3,4] x) => (float[1,4,4] y) { t = Tile(token, s)\n y = Concat <axis = 1> (t, x) }",
            token=_weights(1, 1, 4), s=_ints(1, 1, 1),
        ), 1,
    ),
    "computed": (_model(COMPUTED), 1),
    "attributes": (
        _model(
            "(float[1,4] x) => (float[1,4] y) { a = Slice <axes = [0], starts = [0], ends = [1]> (x)\n y = Relu(a) }",
            opset=9,
        ), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRED)
@pytest.mark.parametrize("new", ["N", 4])
def test_several_at_once_give_what_each_gives_alone(name: str, new: int | str) -> None:
    original, count = REPAIRED[name]
    (source,) = original.graph.inputs
    assert source.shape is not None
    axis = 1 if name == "recurrent" else 0
    shape = [new if place == axis else int(str(size)) for place, size in enumerate(source.shape)]
    model = _copy(original)
    result = set_shape(model, {"x": shape})
    assert len(result.repaired) == count
    sizes = [new] if isinstance(new, int) else [1, 2, 5]
    for size in sizes:
        parts = [_weights(*[1 if place == axis else int(str(dim)) for place, dim in enumerate(source.shape)]) + number
                 for number in range(size)]  # fmt: skip
        (got,) = _run(model, np.concatenate(parts, axis))
        expected = [_run(original, part)[0] for part in parts]
        np.testing.assert_allclose(got, np.concatenate(expected, axis), rtol=1e-5, atol=1e-5)
        if size == 1:
            assert np.array_equal(got, expected[0])
    # The stated shape of the output is the one that it has.
    stated = model.graph.outputs[0].shape
    assert stated is not None
    assert stated[axis] == new
    assert prove(original, model).max_abs < 1e-5


def test_a_named_axis_whose_graph_holds_one_size_is_repaired_when_it_is_fixed() -> None:
    text = RESHAPE.replace("float[1,4,4,4]", "float[N,4,4,4]").replace("float[1,5]", "float[N,5]")
    original = _model(text, s=_ints(1, 64), w=_weights(64, 5))
    model = _copy(original)
    assert len(set_axis(model, "N", 4).repaired) == 1
    assert _run(model, _weights(4, 4, 4, 4))[0].shape == (4, 5)
    assert prove(original, model).runs == 1


def test_an_axis_that_the_graph_leaves_open_is_left_alone() -> None:
    text = RESHAPE.replace("float[1,4,4,4]", "float[N,4,4,4]").replace("float[1,5]", "float[N,5]")
    model = _model(text, s=_ints(-1, 64), w=_weights(64, 5))
    assert set_axis(model, "N", 4).repaired == ()
    assert [node.op_type for node in model.graph] == ["Reshape", "MatMul"]


REFUSED: dict[str, tuple[ir.Model, Sequence[int | str], Sequence[str]]] = {
    # Positions of 7 tokens cannot be stretched.
    "positions": (
        _model("(float[1,7,4] x) => (float[1,7,4] y) { y = Add(x, table) }", table=_weights(1, 7, 4)),
        [1, 9, 4],
        ["Add", "'table'"],
    ),
    "weights": (
        _model("(float[2,8] x) => (float[2,3] y) { y = MatMul(x, w) }", w=_weights(8, 3)), [2, 6], ["MatMul", "'w'"],
    ),
    # A batch of one is taken apart.
    "squeezed": (
        _model("(float[1,8] x) => (float[8] y) <int64[1] a = {0}> { y = Squeeze(x, a) }"), [4, 8], ["Squeeze", "'a'"],
    ),
    "one of a batch": (
        _model("(float[1,5] x) => (float[5] y) { y = Gather <axis = 0> (x, i) }", i=np.array(0)), ["N", 5],
        ["Gather", "'i'", "one element of a batch"],
    ),
    "split": (
        _model("(float[3,2] x) => (float[1,2] y, float[2,2] z) <int64[2] s = {1, 2}> { y, z = Split(x, s) }"),
        [4, 2],
        ["Split", "'s'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_follow_is_named_and_refused(name: str) -> None:
    model, shape, words = REFUSED[name]
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(GraphError) as caught:
        set_shape(model, {"x": shape})
    assert all(word in str(caught.value) for word in words)
    assert ir.to_proto(model).SerializeToString() == before


def test_verification_runs_the_new_sizes() -> None:
    # What stating shapes alone made of it: valid, and wrong for every batch but 1.
    original = _model(RESHAPE, s=_ints(1, 64), w=_weights(64, 5))
    for size in ("N", 4):
        stated = _copy(original)
        assert stated.graph.inputs[0].shape is not None
        stated.graph.inputs[0].shape = ir.Shape([size, 4, 4, 4])
        with pytest.raises(VerificationError, match="cannot be run at its new size") as caught:
            prove(original, stated)
        assert "axis 0 of 'x'" in caught.value.where


def test_a_graph_that_mixes_its_batch_fails_verification() -> None:
    text = "(float[1,4] x) => (float[1,4] y) { m = ReduceMax <axes = [0], keepdims = 1> (x)\n y = Sub(x, m) }"
    original = _model(text)
    model = _copy(original)
    set_shape(model, {"x": ["N", 4]})
    with pytest.raises(VerificationError, match="2 at once is not what each gives alone"):
        prove(original, model)


def test_what_can_only_be_run_is_said() -> None:
    original = _model("(float[1,1,8,8] x) => (float[1,1,1,1] y) { y = GlobalMaxPool(x) }")
    model = _copy(original)
    set_shape(model, {"x": [1, 1, "h", 8]})
    proof = prove(original, model)
    assert proof.only_run == (str(Resized((AxisOfInput("x", 2),), 8, "h")),)
    assert "nothing to compare with" in str(proof)
