"""Operators converted across the versions at which they changed: what one node computes stays, or is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import validate
from vlm_export.graph.core.onnxruntime_session import start_session
from vlm_export.graph.passes.convert_opset import convert_opset

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def _floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


IMAGE, CUBE = _floats(1, 2, 8, 8), _floats(2, 3, 4)
LARGER, SMALLER, HALF = (np.array([1, 1, *scales], np.float32) for scales in ((2, 1.6), (0.6, 0.7), (0.5, 2)))
NONE = np.array([], np.float32)
INDEX = np.array([[0, 0]], np.int64)


def _softmaxes() -> list[Any]:
    pairs = [(13, 12), (13, 11), (13, 9), (11, 13), (9, 18), (12, 13)]
    axes: list[dict[str, Any]] = [{}, *({"axis": axis} for axis in (0, 1, 2, -1))]
    return [
        (op_type, old, new, attributes, [CUBE])
        for op_type in ("Softmax", "LogSoftmax", "Hardmax")
        for old, new in pairs
        for attributes in axes
    ]


def _resizes() -> list[Any]:
    cases: list[Any] = []
    for mode in ("linear", "nearest"):
        for new in (11, 13, 18, 19):
            cases += [("Resize", 10, new, {"mode": mode}, [IMAGE, scales]) for scales in (LARGER, SMALLER, HALF)]
            cases += [("Upsample", 9, new, {"mode": mode}, [IMAGE, LARGER])]
            cases += [("Upsample", 7, new, {"mode": mode, "scales": [1.0, 1.0, 2.0, 2.0]}, [IMAGE])]
        cases += [("Resize", 11, new, {"mode": mode}, [IMAGE, NONE, LARGER]) for new in (10, 13, 18, 19)]
    symmetric = {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}
    return [*cases, ("Resize", 19, 18, symmetric, [IMAGE, None, LARGER])]


OTHERS: list[Any] = [
    ("GroupNormalization", 18, 21, {"num_groups": 2}, [_floats(1, 4, 3), _floats(2), _floats(2)]),
    ("GroupNormalization", 18, 21, {"num_groups": 2}, [_floats(1, 2, 3), _floats(2), _floats(2)]),
    ("GroupNormalization", 21, 18, {"num_groups": 2}, [_floats(1, 4, 3), _floats(4), _floats(4)]),
    ("Pad", 19, 18, {"mode": "wrap"}, [_floats(4), np.array([1, 1])]),
    ("Pad", 19, 18, {"mode": "reflect"}, [_floats(4), np.array([1, 1])]),
    *(("ScatterND", 18, 16, {"reduction": kind}, [_floats(2, 2), INDEX, _floats(1)]) for kind in ("max", "add")),
    *(("ScatterElements", 18, 16, {"reduction": kind}, [CUBE[0], INDEX, _floats(1, 2)]) for kind in ("min", "add")),
    *(("GridSample", 16, new, {}, [IMAGE, _floats(1, 3, 3, 2)]) for new in (20, 22)),
    ("RoiAlign", 10, 16, {"output_height": 2, "output_width": 2}, [IMAGE, _floats(1, 4) + 3, np.array([0])]),
    ("DFT", 17, 20, {"axis": 2}, [_floats(1, 4, 4, 1)]),
    ("BatchNormalization", 8, 15, {"spatial": 0}, [_floats(1, 2, 3), *(np.abs(_floats(2, 3)) for _ in range(4))]),
    ("AveragePool", 18, 19, {"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}, [IMAGE]),
    ("Clip", 10, 11, {"min": 0.1}, [CUBE]),
    ("Split", 11, 18, {"axis": 1, "split": [1, 1]}, [IMAGE]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op_type", "old", "new", "attributes", "inputs"),
    [*_softmaxes(), *_resizes(), *OTHERS],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_a_node_computes_the_same_or_is_refused(
    op_type: str, old: int, new: int, attributes: dict[str, Any], inputs: list[Array | None]
) -> None:
    proto = _one_node(op_type, old, attributes, inputs)
    expected = _run(proto, inputs[0])
    model = ir.from_proto(proto)
    try:
        convert_opset(model, new)
    except GraphError as error:
        assert f"operator {op_type} cannot be converted" in error.what  # noqa: PT017
        return
    validate(model)
    got = _run(ir.to_proto(model), inputs[0])
    assert all(np.allclose(left, right, rtol=0, atol=1e-6) for left, right in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    ("op_type", "old", "new", "attributes", "inputs"),
    [
        ("Softmax", 13, 11, {}, [CUBE]),
        ("LogSoftmax", 13, 9, {"axis": 2}, [CUBE]),
        ("Hardmax", 11, 13, {"axis": 2}, [CUBE]),
        ("Resize", 10, 18, {"mode": "linear"}, [IMAGE, SMALLER]),
        ("Resize", 10, 11, {}, [IMAGE, HALF]),
        ("Upsample", 9, 18, {"mode": "nearest"}, [IMAGE, LARGER]),
        ("GroupNormalization", 18, 21, {"num_groups": 2}, [_floats(1, 2, 3), _floats(2), _floats(2)]),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_what_can_be_said_is_not_refused(
    op_type: str, old: int, new: int, attributes: dict[str, Any], inputs: list[Array | None]
) -> None:
    convert_opset(ir.from_proto(_one_node(op_type, old, attributes, inputs)), new)


def _one_node(op_type: str, opset: int, attributes: dict[str, Any], inputs: list[Array | None]) -> onnx.ModelProto:
    names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
    outputs = ["y", "z"] if op_type == "Split" else ["y"]
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in zip(names[1:], inputs[1:], strict=True)
        if array is not None
    ]
    first = inputs[0]
    assert first is not None
    graph = helper.make_graph(
        [helper.make_node(op_type, names, outputs, **attributes)],
        "g",
        [helper.make_tensor_value_info("i0", TensorProto.FLOAT, first.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 19 else 10)


def _run(proto: onnx.ModelProto, first: Array | None) -> list[Array]:
    results: list[Array] = start_session(proto.SerializeToString()).run(None, {"i0": first})
    return results
