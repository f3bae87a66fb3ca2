"""The oldest ONNX Runtime per graph: what was measured with its releases (see `exporting/oldest_engine.py`)."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from vlm_export.exporting.oldest_engine import oldest_onnxruntime

INT64, INT32, FLOAT = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT


def loaded(nodes: list[onnx.NodeProto], kind: int, opset: int = 17, ir_version: int = 8) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [1, 4]), helper.make_tensor_value_info("b", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", INT64, [1])],
    )
    opsets = [helper.make_opsetid("acme", 99), helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version))


@pytest.mark.parametrize(
    ("opset", "ir_version", "needed"),
    [
        (11, 8, "1.15.1"),
        (19, 9, "1.15.1"),
        (20, 9, "1.17.0"),
        (18, 10, "1.18.0"),
        (21, 10, "1.18.0"),
        (22, 10, "1.21.0"),
        (23, 10, "1.23.0"),
        (18, 11, "1.23.0"),
        (25, 12, "1.24.1"),
        (26, 13, "1.25.0"),
    ],
)
def test_opset_and_format_tell_the_release(opset: int, ir_version: int, needed: str) -> None:
    model = loaded([helper.make_node("Size", ["x"], ["y"])], FLOAT, opset, ir_version)
    assert oldest_onnxruntime(model) == needed


@pytest.mark.parametrize("operator", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize(("kind", "to", "needed"), [
    (INT64, None, "1.20.0"),
    (INT32, None, "1.15.1"),
    (FLOAT, None, "1.15.1"),
    (INT64, INT32, "1.15.1"),
    (FLOAT, INT64, "1.20.0"),
])  # fmt: skip
@pytest.mark.parametrize("inner", [False, True])
def test_the_place_of_the_largest_counts_by_its_dtype(
    operator: str, kind: int, to: int | None, needed: str, inner: bool
) -> None:
    nodes = [] if to is None else [helper.make_node("Cast", ["x"], ["cast"], to=to)]
    found = helper.make_node(operator, ["x" if to is None else "cast"], ["y"], axis=-1, keepdims=0)
    if inner:
        branch = helper.make_graph([found], "branch", [], [helper.make_tensor_value_info("y", INT64, [1])])
        found = helper.make_node("If", ["b"], ["y"], then_branch=branch, else_branch=branch)
    assert oldest_onnxruntime(loaded([*nodes, found], kind)) == needed
