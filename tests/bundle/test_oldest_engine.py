"""The oldest ONNX Runtime per graph: what was measured with its releases (see `bundle/oldest_engine.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vlm_export.bundle.manifest import Manifest, manifest_from_bytes
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.errors import InputError

INT64, INT32, FLOAT = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT


def saved(path: Path, nodes: list[onnx.NodeProto], kind: int, opset: int = 17, ir_version: int = 8) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [1, 4]), helper.make_tensor_value_info("b", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", INT64, [1])],
    )
    opsets = [helper.make_opsetid("acme", 99), helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), str(path))
    return path


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
def test_opset_and_format_tell_the_release(tmp_path: Path, opset: int, ir_version: int, needed: str) -> None:
    path = saved(tmp_path / "m.onnx", [helper.make_node("Size", ["x"], ["y"])], FLOAT, opset, ir_version)
    assert oldest_onnxruntime(path) == (needed, opset)


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
    tmp_path: Path, operator: str, kind: int, to: int | None, needed: str, inner: bool
) -> None:
    nodes = [] if to is None else [helper.make_node("Cast", ["x"], ["cast"], to=to)]
    found = helper.make_node(operator, ["x" if to is None else "cast"], ["y"], axis=-1, keepdims=0)
    if inner:
        branch = helper.make_graph([found], "branch", [], [helper.make_tensor_value_info("y", INT64, [1])])
        found = helper.make_node("If", ["b"], ["y"], then_branch=branch, else_branch=branch)
    assert oldest_onnxruntime(saved(tmp_path / "m.onnx", [*nodes, found], kind))[0] == needed


@pytest.mark.parametrize("odd", ["", "1.23", "1.23.0rc1", "1.23.0\n", 1.23, None, [1, 23, 0]])
def test_the_manifest_takes_releases_alone(manifest: Manifest, odd: object) -> None:
    data = json.loads(manifest.to_bytes())
    assert manifest_from_bytes(manifest.to_bytes()).parts[0].variants[0].oldest_onnxruntime == "1.18.0"
    data["parts"][0]["variants"][0]["oldest_onnxruntime"] = odd
    with pytest.raises(InputError, match="oldest_onnxruntime"):
        manifest_from_bytes(json.dumps(data).encode())
