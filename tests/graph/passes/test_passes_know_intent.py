"""What passes must not do without a word: unfold quantised weights, grow a model, take a converter as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlm_export.errors import GraphError
from vlm_export.graph.edits.dtypes import set_dtype
from vlm_export.graph.passes.cancel_transposes import cancel_transposes
from vlm_export.graph.passes.constant_fold import fold_all_constants
from vlm_export.graph.passes.convert_opset import convert_opset
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.graph.passes.share_initializers import share_initializers
from vlm_export.graph.passes.static_arguments import make_arguments_static
from vlm_export.graph.prove.prove import prove

DTYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def _model(
    nodes: list[onnx.NodeProto],
    opset: int,
    ends: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    ir_version: int = 8,
) -> ir.Model:
    """Ends: name → (dtype, shape); those that no node makes are inputs."""
    made = {name for node in nodes for name in node.output}
    infos = {name: helper.make_tensor_value_info(name, *form) for name, form in ends.items()}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [info for name, info in infos.items() if name not in made],
        [info for name, info in infos.items() if name in made],
        tensors,
    )
    if ir_version < 4:
        graph.input.extend(helper.make_tensor_value_info(e.name, e.data_type, list(e.dims)) for e in tensors)
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    )


def test_quantised_weights_stay_quantised() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "ws", "wz"], ["w"], axis=1),
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("MatMul", ["xd", "w"], ["m"]),
        # A weight that training only rounded: both nodes of the pair have constant inputs.
        helper.make_node("QuantizeLinear", ["b", "xs", "xz"], ["bq"]),
        helper.make_node("DequantizeLinear", ["bq", "xs", "xz"], ["bd"]),
        helper.make_node("Add", ["m", "bd"], ["y"]),
    ]
    weights = {
        "q": np.random.default_rng(0).integers(-100, 100, (8, 8)).astype(np.int8),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
        "xs": np.float32(0.02),
        "xz": np.int8(0),
        "b": np.ones(8, np.float32),
    }
    ends = {"x": (TensorProto.FLOAT, ["N", 8]), "y": (TensorProto.FLOAT, ["N", 8])}
    original = _model(nodes, 13, ends, weights)
    model = _copy(original)
    for change in (fold_all_constants, remove_noops, make_arguments_static, share_initializers, cancel_transposes):
        change(model)
    assert [node.op_type for node in model.graph] == [node.op_type for node in nodes]
    assert model.graph.initializers["q"].dtype == ir.DataType.INT8
    assert prove(original, model).max_abs == 0


def test_an_expansion_stays_and_is_said() -> None:
    nodes = [
        helper.make_node("Expand", ["one", "big"], ["e"]),
        helper.make_node("Mul", ["x", "e"], ["m"]),
        helper.make_node("ReduceSum", ["m"], ["y"], keepdims=0),
        # Folded wholly: what it makes of the expansion is small.
        helper.make_node("ReduceMax", ["e"], ["small"], keepdims=0),
        helper.make_node("Add", ["x", "small"], ["z"]),
    ]
    ends = {"x": (TensorProto.FLOAT, ["N", 1, 1]), "y": (TensorProto.FLOAT, []), "z": (TensorProto.FLOAT, ["N", 1, 1])}
    weights = {"one": np.ones((1, 1, 1), np.float32), "big": np.array([1, 600, 600])}
    original = _model(nodes, 13, ends, weights)
    model = _copy(original)
    folded = fold_all_constants(model)
    assert (folded.initializers, folded.left) == (1, ("e",))
    assert abs(folded.more_bytes) < 100
    assert [node.op_type for node in model.graph] == ["Expand", "Mul", "ReduceSum", "Add"]
    grown = fold_all_constants(model, growth_bytes=2 << 20)
    assert (grown.initializers, grown.left) == (1, ())
    assert grown.more_bytes == 600 * 600 * 4 - 4 - 24
    assert prove(original, model).max_abs == 0


CONVERTED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "clip": ("Clip", 9, 13, {"min": -0.5, "max": 0.5}),
    "clip below": ("Clip", 6, 11, {"max": 0.25}),
    "pad": ("Pad", 9, 13, {"pads": [0, 1, 0, 2], "value": 1.5}),
    "dropout": ("Dropout", 9, 13, {"ratio": 0.25}),
    "top": ("TopK", 9, 13, {"k": 2}),
    "split": ("Split", 11, 13, {"split": [1, 3]}),
    "mean": ("ReduceMean", 13, 18, {"axes": [1]}),
    "squeeze": ("Unsqueeze", 11, 13, {"axes": [0]}),
    "slice": ("Slice", 9, 13, {"starts": [0], "ends": [2], "axes": [1]}),
    "softmax": ("Softmax", 11, 13, {"axis": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVERTED)
def test_what_were_attributes_become_inputs_of_the_right_dtype(name: str, dtype: str) -> None:
    operator, source, version, attributes = CONVERTED[name]
    outputs = {"y": (DTYPES[dtype], None)}
    if operator == "TopK":
        outputs["z"] = (TensorProto.INT64, None)
    elif operator == "Split":
        outputs["z"] = (DTYPES[dtype], None)
    node = helper.make_node(operator, ["x"], list(outputs), name="mine", **attributes)
    original = _model([node], source, {"x": (DTYPES[dtype], ["N", 4]), **outputs})
    model = _copy(original)
    convert_opset(model, version)
    assert model.opset_imports[""] == version
    proto = ir.to_proto(model)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    if (operator, dtype) == ("Clip", "float64"):
        # ONNX Runtime 1.31 has no Clip of opset 6 for float64: there is nothing to compare with but numpy.
        x = np.linspace(-1, 1, 8).reshape(2, 4)
        (got,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
        assert np.array_equal(got, np.clip(x, attributes.get("min"), attributes["max"]))
        return
    assert prove(original, model).max_abs == 0


def test_a_converter_that_writes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # These bounds are those of no other test: conversions are remembered.
    node = helper.make_node("Clip", ["x"], ["y"], name="mine", min=-0.53, max=0.57)
    model = _model([node], 9, {name: (TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")})
    before = ir.to_proto(model).SerializeToString()
    convert = onnx.version_converter.convert_version

    def wrong(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
        converted = convert(proto, version)
        for tensor in converted.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0.25), tensor.name))
        for entry in converted.graph.node:
            if entry.op_type == "Constant":
                entry.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(0.25)))
        return converted

    monkeypatch.setattr("onnx.version_converter.convert_version", wrong)
    with pytest.raises(GraphError, match="Clip cannot be converted") as caught:
        convert_opset(model, 13)
    assert "other values" in caught.value.got
    assert caught.value.where == "mine"
    assert ir.to_proto(model).SerializeToString() == before


def _zoo_model() -> ir.Model:
    """Weights are listed as inputs, as the file format wanted before IR version 4."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Upsample", ["c", "scales"], ["y"], mode="linear"),
    ]
    weights = {
        "w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    ends = {"x": (TensorProto.FLOAT, ["N", 3, 6, 7]), "y": (TensorProto.FLOAT, None)}
    return _model(nodes, 9, ends, weights, ir_version=3)


def test_weights_of_old_models_stay_constants() -> None:
    original = _zoo_model()
    model = _copy(original)
    convert_opset(model, 13)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert "w" in model.graph.initializers
    proof = prove(original, model)
    assert (proof.max_abs, proof.at_default) == (0, ())
    # Both old: nobody can replace the weights of either, so they are not drawn.
    assert prove(original, _zoo_model()).max_abs == 0


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "bool", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("source", ["float32", "int64"])
def test_new_dtypes_are_fed_values_that_they_hold(dtype: str, source: str) -> None:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "w"], ["y"])]
    weights = {"w": np.float32(1.5)}
    ends = {"x": (kinds[source], ["N", 3, 8]), "y": (TensorProto.FLOAT, ["N", 3, 8])}
    original = _model(nodes, 13, ends, weights)
    model = _copy(original)
    set_dtype(model, {"x": dtype})
    assert prove(original, model, may_change_dtypes=True).max_abs == 0
