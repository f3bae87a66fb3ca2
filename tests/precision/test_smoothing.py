"""Outliers of norms that move into weights: exactly what was computed stays, and fewer bits lose less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from vlm_export.graph.core.files import Storage, save_model
from vlm_export.precision.quantised import quantise
from vlm_export.precision.recipes import RECIPES
from vlm_export.precision.smoothing import smooth, smoothable, smoothed_by
from vlm_export.proof.metrics import Array
from vlm_export.quantizing.calibration import calibrated
from vlm_export.quantizing.losses import output_losses
from vlm_export.runtime.engines.onnxruntime import OrtEngine

WIDTH = 64
GRAPH = """<ir_version: 9, opset_import: ["" : 18]>
agraph (float[batch, 64] states) => (float[batch, 64] result)
{
  normed = LayerNormalization <axis = -1> (states, weight, bias)
  query = MatMul (normed, left)
  key = MatMul (normed, right)
  both = Mul (query, key)
  again = LayerNormalization <axis = -1> (both, other, bias_of_other)
  activated = Relu (again)
  projected = MatMul (again, last)
  result = Add (activated, projected)
}
"""


@pytest.fixture
def model() -> ir.Model:
    """Two channels of the first norm reach 64 times as far as others, their rows of weights as much less."""
    rng, outliers = np.random.default_rng(0), np.ones(WIDTH, np.float32)
    outliers[[3, 40]] = 64
    proto = onnx.parser.parse_model(GRAPH)
    vectors = {"weight": outliers, "bias": np.float32(0.1) * outliers}
    vectors |= {name: rng.standard_normal(WIDTH).astype(np.float32) for name in ("other", "bias_of_other")}
    matrices = {name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in ("left", "right", "last")}
    for name in ("left", "right"):
        matrices[name] /= outliers[:, None]
    for name, array in {**vectors, **matrices}.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    made: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    return made


@pytest.fixture
def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"states": rng.standard_normal((8, WIDTH)).astype(np.float32)} for _ in range(6)]


def run(model: ir.Model, folder: Path, feeds: list[dict[str, Array]]) -> list[dict[str, Array]]:
    (path,) = save_model(model.clone(), folder / "ran.onnx", storage=Storage())
    engine = OrtEngine(path, threads=1, exact=True)
    found = [engine.run(one) for one in feeds]
    path.unlink()
    return found


def test_only_norms_that_products_alone_read_are_smoothed(model: ir.Model) -> None:
    (one,) = smoothable(model.graph)
    assert one.value == "normed"
    assert {product.outputs[0].name for product in one.products} == {"query", "key"}


def test_a_weight_that_another_node_reads_is_left_alone(model: ir.Model) -> None:
    products = [node for node in model.graph if node.op_type == "MatMul"]
    products[-1].replace_input_with(1, products[0].inputs[1])
    assert smoothable(model.graph) == []


def test_numbers_are_powers_of_two_and_nothing_else_changes(
    model: ir.Model, feeds: list[dict[str, Array]], tmp_path: Path
) -> None:
    largest = calibrated(model, RECIPES["int8-static"], feeds, tmp_path, 1).largest
    smoothed = model.clone()
    smooth(smoothed.graph, largest)
    before, after = (
        {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value is not None}
        for graph in (model.graph, smoothed.graph)
    )
    factors = before["weight"] / after["weight"]
    assert np.all(np.log2(factors) == np.rint(np.log2(factors)))
    assert factors[[3, 40]].min() >= 16 * np.median(factors)
    assert np.array_equal(after["left"], before["left"] * factors[:, None])
    assert np.array_equal(after["other"], before["other"])
    told = {name: smoothed_by(value) for name, value in smoothed.graph.initializers.items()}
    assert {name for name, norm in told.items() if norm == "weight"} == {"weight", "bias", "left", "right"}
    for expected, got in zip(run(model, tmp_path, feeds), run(smoothed, tmp_path, feeds), strict=True):
        assert np.array_equal(got["result"], expected["result"])


def test_what_eight_bits_lose_to_outliers_comes_back(
    model: ir.Model, feeds: list[dict[str, Array]], tmp_path: Path
) -> None:
    recipe = RECIPES["int8-static"]
    with_smoothing = calibrated(model, recipe, feeds, tmp_path, 1)
    losses = []
    for calibration in (with_smoothing, calibrated(model, replace(recipe, smooths=False), feeds, tmp_path, 1)):
        made = quantise(model, recipe, tmp_path / "levels.bin", calibration=calibration)
        found = output_losses(zip(run(model, tmp_path, feeds), run(made.model, tmp_path, feeds), strict=True))
        losses.append(1 - found["result"].mean_cosine)
    assert losses[0] < losses[1] / 4
