"""What passes and edits must not lose: dtypes of arguments, what annotations name, the validity of old models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlm_export.graph.core.dead_code import DeadCode, remove_dead_code
from vlm_export.graph.core.inference import validate
from vlm_export.graph.core.onnxruntime_session import start_session
from vlm_export.graph.edits.extract import extract
from vlm_export.graph.edits.node_edits import insert_node
from vlm_export.graph.passes.constant_fold import fold_all_constants
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.graph.passes.share_initializers import share_initializers
from vlm_export.graph.passes.static_arguments import make_arguments_static


def _run(model: ir.Model, x: Any) -> list[Any]:
    results: list[Any] = start_session(ir.to_proto(model).SerializeToString()).run(None, {"x": x})
    return results


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("e = Add(a, b)\n y = Slice(x, zeros, e)", {"a": np.array([1, 1], np.int32), "b": np.array([0, 1], np.int32)}),
        ("e = Cast<to=6>(a)\n y = Slice(x, zeros, e)", {"a": np.array([2**63 - 1, 2**32 + 2], np.int64)}),
        (
            "e = Mul(a, b)\n y = Slice(x, zeros, e)",
            {"a": np.array([65537, 1], np.int32), "b": np.array([65537, 2], np.int32)},
        ),
        ("e = Add(a, a)\n r = Range(zero, e, one)\n y = Cast<to=1>(r)", {"a": np.int16(3)}),
        (
            "e = Div(a, b)\n y = Slice(x, zeros, e)",
            {"a": np.array([-7, 9], np.int32), "b": np.array([4, -4], np.int32)},
        ),
        ("u = Unsqueeze(a, two)\n v = Squeeze(u, first)\n y = Reshape(x, v)", {"a": np.int64(-1)}),
    ],
)
def test_arguments_keep_their_dtype_and_wrap_in_it(body: str, weights: Mapping[str, Any]) -> None:
    short = np.int16 if "Range" in body else np.int32
    known = {
        "zeros": np.array([0, 0], np.int32),
        "zero": short(0),
        "one": short(1),
        "two": np.array([0, 1], np.int64),
        "first": np.array([0], np.int64),
    }
    text = f"g (float[2,3] x) => (float[...] y) {{ {body} }}".replace("float[...]", "float")
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}')
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in {**known, **weights}.items()
    )
    model = ir.from_proto(proto)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = _run(model, x)
    make_arguments_static(model)
    assert all(np.array_equal(*pair) for pair in zip(expected, _run(model, x), strict=True))


def test_arguments_that_do_not_fit_together_stay() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2,3] x) => (float[a,b] y) <int64[3] p = {1,2,3}, int64[2] q = {1,2}> {
        s = Add(p, q)
        y = Reshape(x, s)
    }"""
    assert make_arguments_static(ir.from_proto(onnx.parser.parse_model(text))) == 0


def _annotated() -> ir.Model:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[2] x) => (float[2] y) <float s = {0.5}, float s2 = {0.5}, uint8 z = {3}> {
        a = Relu(x)
        b = Exp(x)
        y = Neg(a)
    }"""
    proto = onnx.parser.parse_model(text)
    for tensor, names in (("a", ("s", "z")), ("x", ("s2", "z"))):
        annotation = proto.graph.quantization_annotation.add(tensor_name=tensor)
        for key, name in zip(("SCALE_TENSOR", "ZERO_POINT_TENSOR"), names, strict=True):
            annotation.quant_parameter_tensor_names.add(key=key, value=name)
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    "change",
    [
        remove_dead_code,
        share_initializers,
        fold_all_constants,
        remove_noops,
        lambda model: insert_node(model, "Add", after="a", inputs=[np.array([1.0, 2.0], np.float32)]),
        lambda model: extract(model, None, ["y"]),
    ],
)
def test_quantization_annotations_keep_what_they_name(change: Callable[[ir.Model], object]) -> None:
    model = _annotated()
    result = change(model)
    proto = ir.to_proto(result if isinstance(result, ir.Model) else model)
    named = {entry.value for item in proto.graph.quantization_annotation for entry in item.quant_parameter_tensor_names}
    assert named == {"s", "s2", "z"}
    assert named <= {tensor.name for tensor in proto.graph.initializer}


def test_what_an_annotation_of_a_removed_tensor_named_goes() -> None:
    model = _annotated()
    model.graph.outputs[0] = next(node for node in model.graph if node.op_type == "Exp").outputs[0]
    assert remove_dead_code(model) == DeadCode(2, 1, 0)
    assert remove_dead_code(model) == DeadCode(0, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        fold_all_constants,
        make_arguments_static,
        lambda model: insert_node(model, "Add", after="y", inputs=[np.array([1.0], np.float32)]),
        lambda model: extract(model, ["x"], ["y"]),
    ],
)
def test_initializers_of_old_models(change: Callable[[ir.Model], object]) -> None:
    text = """<ir_version: 3, opset_import: ["" : 13]>
    g (float[2,3] x, float[3] w) => (float[a] y) <float[3] w = {1,2,3}> {
        k = Constant<value_float = 2.0>()
        k2 = Sqrt(k)
        s = Constant<value_ints = [2, 3]>()
        p = ReduceProd<axes = [0]>(s)
        m = Mul(x, k2)
        n = Mul(m, w)
        y = Reshape(n, p)
    }"""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto)
    model = ir.from_proto(proto)
    result = change(model)
    validate(result if isinstance(result, ir.Model) else model)
