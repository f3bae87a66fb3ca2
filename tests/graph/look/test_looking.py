"""Show and find: what they say of small models whose every part is known."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.look.find import find_nodes
from vlm_export.graph.look.show import describe_model

TEXT = """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1, "local" : 1]>
g (float[n,4] x, bool c) => (float[n,4] y, float[4,n] t)
    <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4] b = {1,2,3,4}> {
    m = MatMul(x, w)
    [bias] a = Add(m, b)
    [act] g0 = com.microsoft.FastGelu(a)
    f = local.same(g0)
    t = Transpose<perm=[1,0]>(f)
    y = If (c) <then_branch = g1 () => (float[n,4] p) { q = Relu(g0) p = LeakyRelu<alpha=0.25>(q) },
                else_branch = g2 () => (float[n,4] e) { e = Identity(a) }>
}
<domain: "local", opset_import: ["" : 18]> same (v) => (u) { u = Relu(v) }"""


@pytest.fixture
def model() -> ir.Model:
    found: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)))
    next(node for node in found.graph if node.name == "act").name = "blocks.0.act"
    return found


def test_description(model: ir.Model) -> None:
    data = describe_model(model)
    assert data["opsets"] == {"ai.onnx": 18, "com.microsoft": 1, "local": 1}
    assert data["inputs"][0] == {"name": "x", "dtype": "float32", "shape": ["n", 4]}
    assert data["operators"]["Relu"] == 2
    assert data["operators"]["com.microsoft:FastGelu"] == 1
    assert (data["graphs"], data["functions"]) == (4, ["local:same"])
    assert data["weights"]["bytes_by_dtype"] == {"float32": 80}
    assert data["weights"]["largest"][0] == {"name": "w", "dtype": "float32", "shape": [4, 4], "bytes": 64}
    assert "g0" in data["unknown_shapes"]["without_shape"]
    assert data["custom_domains"] == {"com.microsoft": 1, "local": 1}
    assert data["missing_imports"] == []
    del model.opset_imports["com.microsoft"]
    assert describe_model(model)["missing_imports"] == ["com.microsoft"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("Relu", ["q", "u"]),
        ("*Relu", ["q", "p", "u"]),
        ("Relu|Add", ["a", "q", "u"]),
        ("FastGelu", []),
        ("com.microsoft:*Gelu", ["g0"]),
        ("*:*Gelu", ["g0"]),
        ("ai.onnx:Add", ["a"]),
        ("MatMul -> Add -> *:*Gelu", ["m"]),
        ("MatMul -> *:*Gelu", []),
        ("MatMul ->> *:*Gelu", ["m"]),
        ("*:FastGelu -> Relu", ["g0"]),
        ("Transpose[@perm=(1,0)]", ["t"]),
        ("Transpose[@perm=(0,1)]", []),
        ("*[@alpha]", ["p"]),
        ("*[@alpha=0.25]", ["p"]),
        ("*Relu[!@alpha]", ["q", "u"]),
        ("*:*[name=blocks.*]", ["g0"]),
        ("*[name=bias, in1=const]", ["a"]),
        ("*[in1=const]", ["m", "a"]),
        ("*[in=input]", ["m", "y", "u"]),
        ("*[in1=float32(4,4)]", ["m"]),
        ("*[out0=(n,*)]", ["m", "a", "y", "p", "e"]),
        ("*[out0=(...,n)]", ["t"]),
        ("*[out0=(...)]", ["m", "a", "t", "y", "p", "e"]),
        ("*[in0=float16]", []),
    ],
)
def test_patterns(model: ir.Model, pattern: str, found: list[str]) -> None:
    assert [chain[0].outputs[0].name for chain in find_nodes(model, pattern)] == found


@pytest.mark.parametrize("pattern", ["", "Relu ->", "-> Relu", "Relu[", "Relu[perm=1]", "Relu Add", "Relu[where=x]"])
def test_malformed_patterns_are_refused(model: ir.Model, pattern: str) -> None:
    with pytest.raises(GraphError, match="the pattern"):
        find_nodes(model, pattern)


def test_a_chain_names_all_of_its_nodes(model: ir.Model) -> None:
    ((first, second, third),) = find_nodes(model, "MatMul -> Add ->> Transpose")
    assert [node.op_type for node in (first, second, third)] == ["MatMul", "Add", "Transpose"]
