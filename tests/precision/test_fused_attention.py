"""Attention in one node: where it may be, that the numbers stay, and what is left as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from vlm_export.bundle.opened import open_bundle
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.precision.fused_attention import fuse_attention
from vlm_export.proof.golden import iterate_golden
from vlm_export.proof.metrics import Array
from vlm_export.runtime.engines.onnxruntime import OrtEngine

PACKED = """<ir_version: 9, opset_import: ["" : 18]>
agraph (float[batch, tokens, {width}] states) => (float[batch, tokens, 16] result)
<int64[5] to_heads = {{0, 0, 3, 2, 8}}, int64[3] merged = {{0, 0, 16}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
 int64[1] two = {{2}}, int64[1] three = {{3}}, float scale = {{0.3}}, float[5, 5] mask = {{{mask}}}>
{{
  split = Reshape (states, to_heads)
  heads = Transpose <perm = [{perm}]> (split)
  first = Slice (heads, zero, one, zero)
  second = Slice (heads, one, two, zero)
  third = Slice (heads, two, three, zero)
  query = Squeeze (first, zero)
  key = Squeeze (second, zero)
  value = Squeeze (third, zero)
  turned = Transpose <perm = [0, 1, 3, 2]> (key)
  scaled = Mul (query, scale)
  scores = MatMul (scaled, turned)
  masked = {masked}
  weights = Softmax <axis = -1> (masked)
  attended = MatMul (weights, value)
  side = Transpose <perm = [0, 2, 1, 3]> (attended)
  result = Reshape (side, merged)
}}
"""


def packed(*, masked: bool = False, perm: str = "2, 0, 3, 1, 4") -> ir.Model:
    """Attention with two heads of eight columns and a scale of its own, of queries, keys and values side by side."""
    mask = ", ".join("0" if column <= row else "-10000" for row in range(5) for column in range(5))
    masking = "Add (scores, mask)" if masked else "Identity (scores)"
    text = PACKED.format(width=48, mask=mask, masked=masking, perm=perm)
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True, data_prop=True)
    model: ir.Model = ir.from_proto(proto)
    ir.passes.common.IdentityEliminationPass()(model)
    return model


def outputs(model: ir.Model, states: Array) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"states": states})
    return np.asarray(found)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_queries_keys_and_values_side_by_side_become_columns_of_one_node() -> None:
    model, states = packed(), np.random.default_rng(0).standard_normal((2, 7, 48)).astype(np.float32)
    before = outputs(model, states)
    assert fuse_attention(model) == 1
    assert operators(model)["Transpose"] == operators(model)["Softmax"] == 0
    assert operators(model)["MultiHeadAttention"] == 1
    assert np.allclose(outputs(model, states), before, atol=1e-6)


def test_what_is_masked_stays() -> None:
    model = packed(masked=True)
    assert fuse_attention(model) == 0
    assert operators(model) == operators(packed(masked=True))


def test_heads_that_do_not_lie_side_by_side_stay() -> None:
    # Heads stand before what is packed, so that a query's columns are not one piece.
    assert fuse_attention(packed(perm="2, 0, 1, 3, 4")) == 0


# Bundle → attentions of each part that become one node; those of all others have masks or caches.
FUSED = {"vqa": {"vision": 1}, "222m": {"vision_encoder": 2}, "v2_6": {}, "demo": {"vision": 4}}


@pytest.mark.parametrize("name", FUSED)
def test_each_part_computes_what_it_did(
    name: str,
    demo: Path,
    blip_bundle: Callable[[str], Path],
    nanovlm_bundle: Callable[[str], Path],
    slice_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    made = {"vqa": blip_bundle, "222m": nanovlm_bundle, "v2_6": slice_bundle}
    bundle = open_bundle(made[name](name) if name in made else demo)
    found = {}
    for part in bundle.manifest.parts:
        model = open_model(bundle.model_files(part.variant("fp32")))
        count = fuse_attention(model)
        if not count:
            continue
        found[part.name] = count
        (graph,) = save_model(model, tmp_path / f"{part.name}.onnx", storage=Storage())
        fused, float32 = (OrtEngine(path, threads=1) for path in (graph, bundle.graph_file(part.variant("fp32"))))
        for record in iterate_golden(bundle, part.name):
            expected, got = float32.run(record.inputs), fused.run(record.inputs)
            for output, array in expected.items():
                assert np.allclose(got[output], array, atol=1e-5 * max(1, np.abs(array).max())), output
    assert found == FUSED[name]
