"""Our passes among onnx_ir's own; and, for each that the library has too, the case for which ours is kept.

A test of such a case that fails with a newer library says that our pass may go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as library
import pytest
from onnxscript import optimizer, version_converter
from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

from vlm_export.graph.core.dead_code import remove_dead_code
from vlm_export.graph.passes import GraphPass
from vlm_export.graph.passes.constant_fold import fold_all_constants
from vlm_export.graph.passes.convert_opset import convert_opset
from vlm_export.graph.passes.fold_weights import fold_batch_norms
from vlm_export.graph.passes.infer_shapes import infer_shapes
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.graph.passes.share_initializers import share_initializers


def _model(body: str, opset: int = 18, domains: str = "") -> ir.Model:
    head = f'<ir_version: 8, opset_import: ["" : {opset}{domains}]>'
    return ir.from_proto(onnx.parser.parse_model(f"{head}\n{body}"))


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_ours_run_in_a_pass_manager_until_nothing_changes() -> None:
    chain = "\n".join(f"v{i} = Identity(v{i - 1})" for i in range(1, 5))
    model = _model(f"g (float[n] x) => (float[n] y) {{ v0 = Relu(x)\n {chain}\n y = Neg(v4)\n dead = Exp(v4) }}")
    noops, dead = GraphPass(remove_noops), GraphPass(remove_dead_code)
    manager = ir.passes.PassManager([noops, dead, library.RemoveUnusedOpsetsPass()], steps=3, early_stop=True)
    assert manager(model).modified
    assert _operators(model) == ["Relu", "Neg"]
    # The second round found nothing left.
    assert (noops.found, bool(dead.found)) == ({}, False)
    assert not manager(model).modified


BRANCHES = """g (float[n] x, bool c) => (float[n] y) <float[1] w = {1.0}> {
    a = Exp(x)
    z = If (c) <then_branch = t () => (float[n] p) { p = Add(a, w) }, else_branch = e () => (float[n] q) { q = Neg(a) }>
    y = Relu(x)
}"""
SHARED = """g (float[3] x, bool c) => (float[3] y) <float[3] a = {1,2,3}> {
    s = Add(a, x)
    y = If (c) <then_branch = t () => (float[3] p) <float[3] k = {1,2,3}> { p = Mul(k, s) },
                else_branch = e () => (float[3] q) { q = Neg(s) }>
}"""
NAMES = "g (float[n] x) => (float[n] z, float[n] w) { a = Relu(x)\n z = Identity(a)\n w = Identity(a) }"
FOREIGN = "g (float[n,4] x) => (float[n,4] y) { a = com.microsoft.FastGelu(x)\n b = Relu(a)\n y = Neg(b) }"


@pytest.mark.parametrize(
    ("text", "pass_of_library", "ours", "is_right"),
    [
        (BRANCHES, library.RemoveUnusedNodesPass(), remove_dead_code, lambda m: _operators(m) == ["Relu"]),
        (
            SHARED,
            library.DeduplicateHashedInitializersPass(),
            share_initializers,
            lambda m: sum(len(graph.initializers) for graph in m.graphs()) == 1,
        ),
        (
            NAMES,
            library.IdentityEliminationPass(),
            remove_noops,
            lambda m: [value.name for value in m.graph.outputs] == ["z", "w"],
        ),
        (FOREIGN, library.ShapeInferencePass(), infer_shapes, lambda m: m.graph[1].outputs[0].shape == ["n", 4]),
    ],
    ids=["read by a dead If", "equal in an inner graph", "two names of one tensor", "an operator of onnxruntime"],
)
def test_what_the_library_leaves_or_loses(
    text: str,
    pass_of_library: ir.passes.InPlacePass,
    ours: Callable[[ir.Model], object],
    is_right: Callable[[ir.Model], bool],
) -> None:
    model = _model(text, domains=', "com.microsoft" : 1')
    ours(model)
    assert is_right(model)
    model = _model(text, domains=', "com.microsoft" : 1')
    for _ in range(2):
        pass_of_library(model)
    assert not is_right(model)


def test_the_library_does_not_convert_float64_or_keep_functions() -> None:
    clip = "g (double[n,4] x) => (double[n,4] y) { y = Clip<min=-0.5,max=0.5>(x) }"
    ours, theirs = _model(clip, opset=9), _model(clip, opset=9)
    convert_opset(ours, 13)
    version_converter.convert_version(theirs, 13, fallback=True)
    onnx.checker.check_model(ir.to_proto(ours), full_check=True)
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(ir.to_proto(theirs), full_check=True)
    local = """g (float[n] x) => (float[n] y) { y = local.same(x) }
    <domain: "local", opset_import: ["" : 18]> same (a) => (b) { b = Identity(a) }"""
    ours, theirs = (_model(local, domains=', "local" : 1') for _ in range(2))
    convert_opset(ours, 19)
    version_converter.convert_version(theirs, 19)
    assert (len(ours.functions), len(theirs.functions)) == (1, 0)


def test_the_library_grows_a_model_without_limit() -> None:
    """Each expanded value is below its limit; together they are eight times ours."""
    lines = "\n".join(f"e{i} = Expand(k{i}, s)\n v{i + 1} = Mul(v{i}, e{i})" for i in range(8))
    weights = ", ".join(f"float[1,1] k{i} = {{{i}}}" for i in range(8))
    text = f"""g (float[500,500] v0) => (float[500,500] v8) <{weights}, int64[2] s = {{500, 500}}> {{ {lines} }}"""
    ours, theirs = _model(text), _model(text)
    folded = fold_all_constants(ours)
    optimizer.fold_constants(theirs)
    assert folded.more_bytes <= 1 << 20 < sum(v.const_value.nbytes for v in _constants(theirs)) // 7
    assert folded.left


def _constants(model: ir.Model) -> list[Any]:
    values = [value for node in model.graph for value in node.inputs if value is not None]
    return [value for value in dict.fromkeys(values) if value.const_value is not None]


def test_the_library_leaves_a_norm_behind_a_shared_weight() -> None:
    text = """g (float[n,2,4,4] x) => (float[n,2,4,4] y) {
        c = Conv<pads=[1,1,1,1]>(x, w)
        d = BatchNormalization(c, one, zero, zero, one)
        e = Conv<pads=[1,1,1,1]>(d, w)
        y = BatchNormalization(e, one, zero, zero, one)
    }"""
    found = []
    for _ in range(2):
        model = _model(text.replace("x)", "x, float[2,2,3,3] w, float[2] one, float[2] zero)", 1))
        for name, array in (("w", np.ones((2, 2, 3, 3))), ("one", np.ones(2)), ("zero", np.zeros(2))):
            (value,) = [value for value in model.graph.inputs if value.name == name]
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array.astype(np.float32), name=name)
            model.graph.register_initializer(value)
        found.append(model)
    ours, theirs = found
    assert fold_batch_norms(ours) == 2
    fuse_batchnorm_into_conv_rule.apply_to_model(theirs)
    assert _operators(theirs).count("BatchNormalization") > 0
