"""Above protobuf's 2 GB: quantisation reads one weight at a time, and its graph runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.exporting.stages import Stages
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.precision.quantised import quantise
from vlm_export.precision.recipes import RECIPES
from vlm_export.quantizing.losses import row_cosines
from vlm_export.runtime.engines.onnxruntime import OrtEngine

SIZE, LAYERS = 6144, 15


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of 2.3 GB: products one behind the other, whose weights are one file, written a part at a time."""
    folder = tmp_path_factory.mktemp("large")
    rng, data = np.random.default_rng(0), folder / "weights.bin"
    with data.open("wb") as file:
        for _ in range(LAYERS):
            for _ in range(8):
                file.write((rng.standard_normal((SIZE // 8, SIZE), np.float32) / np.float32(np.sqrt(SIZE))).tobytes())
    value = first = ir.Value(name="x", shape=ir.Shape(("batch", SIZE)), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights, length = [], [], 4 * SIZE * SIZE
    for layer in range(LAYERS):
        weight = ir.Value(name=f"w{layer}", shape=ir.Shape((SIZE, SIZE)), type=ir.TensorType(ir.DataType.FLOAT))
        weight.const_value = ir.ExternalTensor(
            data.name,
            layer * length,
            length,
            ir.DataType.FLOAT,
            shape=ir.Shape((SIZE, SIZE)),
            name=f"w{layer}",
            base_dir=str(folder),
        )
        nodes.append(ir.node("MatMul", [value, weight], name=f"product_{layer}"))
        value = nodes[-1].outputs[0]
        value.name, value.shape, value.type = f"y{layer}", first.shape, first.type
        weights.append(weight)
    graph = ir.Graph([first], [value], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="large")
    (path, *_) = save_model(ir.Model(graph, ir_version=10), folder / "large.onnx", storage=Storage())
    data.unlink()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_memory_holds_a_weight_and_not_the_model(large: Path, tmp_path: Path, precision: str) -> None:
    before, stages = anonymous_bytes(), Stages()
    assert before is not None
    with stages.stage("quantize"):
        made = quantise(open_model(large), RECIPES[precision], tmp_path / "levels.bin")
        written = save_model(made.model, tmp_path / "small.onnx", storage=Storage())
    peak = stages.records[0].peak_anonymous_bytes
    assert peak is not None
    # onnxruntime's quantiser makes several copies of a weight; the model has fifteen.
    assert peak - before < 10 * (4 * SIZE * SIZE)
    share = sum(path.stat().st_size for path in written) / (4 * LAYERS * SIZE * SIZE)
    assert share < {"int8": 0.26, "int4": 0.17}[precision]
    x = np.random.default_rng(1).standard_normal((2, SIZE), np.float32)
    expected = OrtEngine(large, threads=1, mapped=True).run({"x": x})[f"y{LAYERS - 1}"]
    got = OrtEngine(written[0], threads=1).run({"x": x})[f"y{LAYERS - 1}"]
    assert row_cosines(expected, got).min() > {"int8": 0.99, "int4": 0.8}[precision]
