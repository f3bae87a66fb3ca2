"""The forms of a graph that the benchmark `vision` measures compute what the graph does; its page of made figures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from vlm_export.lab.bench_plan import BenchOptions, Load, Side
from vlm_export.lab.bench_result import BenchResult, Cost, Measured
from vlm_export.runtime.engines.onnxruntime import OrtEngine

# One layer of attention as the dynamo back end writes it: two heads of four values.
LAYER = """
<ir_version: 10, opset_import: ["": 18]>
layer (float[batch, 5, 8] x) => (float[batch, 5, 6] y)
<int64[5] apart = {-1, 5, 3, 2, 4}, int64[3] together = {-1, 5, 8}, float factor = {0.5},
 int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}> {
    packed = MatMul(x, packed_weight)
    view = Reshape(packed, apart)
    permuted = Transpose<perm = [2, 0, 3, 1, 4]>(view)
    q1 = Slice(permuted, zero, one, zero)
    q = Squeeze(q1, zero)
    k1 = Slice(permuted, one, two, zero)
    k = Squeeze(k1, zero)
    v1 = Slice(permuted, two, three, zero)
    v = Squeeze(v1, zero)
    scaled = Mul(q, factor)
    turned = Transpose<perm = [0, 1, 3, 2]>(k)
    scores = MatMul(scaled, turned)
    weights = Softmax<axis = -1>(scores)
    attended = MatMul(weights, v)
    back = Transpose<perm = [0, 2, 1, 3]>(attended)
    joined = Reshape(back, together)
    out = MatMul(joined, out_weight)
    y = MatMul(out, projection)
}
"""


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(LAYER)
    random = np.random.default_rng(0)
    for name, shape in {"packed_weight": (8, 24), "out_weight": (8, 8), "projection": (8, 6)}.items():
        weight = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "layer.onnx")
    return tmp_path / "layer.onnx"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "scripts"))
    return import_module


def test_forms_compute_what_the_graph_does(scripts: Any, layer: Path, tmp_path: Path) -> None:
    batches = list(np.random.default_rng(1).standard_normal((3, 2, 5, 8)).astype(np.float32))
    forms = scripts("benchmarks.vision_graphs").write_forms(layer, tmp_path, batches)
    assert [node.op_type for node in ir.load(forms["fused"]).graph] == [
        *("MatMul", "Split", "MultiHeadAttention", "MatMul", "MatMul")
    ]
    (expected,) = OrtEngine(layer, threads=1).run({"x": batches[0]}).values()
    for form, most in {"fused": 1e-5, "int8-dynamic": 0.1, "int8-dynamic-fused": 0.1, "int8-static-fused": 0.1}.items():
        (got,) = OrtEngine(forms[form], threads=1).run({"x": batches[0]}).values()
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < most, f"{form}: {error}"
        assert (error > 1e-4) == form.startswith("int8")


def test_the_page_names_the_fastest_within_the_bound(scripts: Any) -> None:
    vision = scripts("benchmarks.vision")
    speeds = {
        Side("torch", "eager", 2): (1.0, 0.0),
        Side("onnxruntime", "int8", 2, "int8.onnx"): (0.25, 1e-4),
        Side("openvino", "bf16", 2): (0.2, 1e-5),
        Side("openvino", "int4", 2): (0.1, 0.1),
    }
    load = Load("vision", 4, None)
    found = BenchResult(
        "bundle",
        ("embed",),
        BenchOptions(),
        tuple(Measured(side, load, (seconds,)) for side, (seconds, _) in speeds.items()),
        tuple(Cost(side, "vision", 1.0, 1 << 20, 1, 1, 1 - lost) for side, (_, lost) in speeds.items()),
    )
    page = vision.report_from_result("a-model", found, [{"form": "fp32", "ms": {"MatMul": 3.0, "Add": 1.0}}], 2)
    assert page.conclusion == "5.00 times (openvino bf16), in ONNX Runtime 4.00 times (onnxruntime int8)."
    assert not page.reached
    assert page.tables[1].rows == [("MatMul", "3.0", "75%"), ("Add", "1.0", "25%")]
