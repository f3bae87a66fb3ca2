"""The half precision pass on graphs made by hand: one for each rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from vlm_export.errors import InputError
from vlm_export.precision.fp16 import convert_to_fp16
from vlm_export.precision.fp16_ranges import graph_of_ranges
from vlm_export.precision.fp16_rounding import round_every_float16

Array = npt.NDArray[Any]
WIDTH = 8
HEADER = '<ir_version: 9, opset_import: ["" : {opset}]> agraph '
rng = np.random.default_rng(0)


def model_of(graph: str, **weights: Any) -> ir.Model:
    """A graph in ONNX's own text form, and its initializers."""
    return model_at(18, graph, **weights)


def model_at(opset: int, graph: str, /, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(HEADER.format(opset=opset) + graph)
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    model: ir.Model = ir.from_proto(inferred)
    return model


def matrix(rows: int = WIDTH, columns: int = WIDTH) -> Array:
    return rng.standard_normal((rows, columns)).astype(np.float32)


def vector(value: float | None = None) -> Array:
    return np.full(WIDTH, value, np.float32) if value is not None else matrix(1)[0]


def run(model: ir.Model, feeds: Mapping[str, Array], rounded: bool = False) -> list[Array]:
    """In ONNX Runtime; `rounded`: as float16 hardware does."""
    copy = model.clone()
    if rounded:
        assert round_every_float16(copy) > 0
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[Array] = session.run(None, dict(feeds))
    return outputs


def checked(model: ir.Model) -> ir.Model:
    """The converted graph, which ONNX's checker takes, and whose interface is the model's."""
    half = convert_to_fp16(model)
    onnx.checker.check_model(ir.to_proto(half), full_check=True)
    for got, expected in ((half.graph.inputs, model.graph.inputs), (half.graph.outputs, model.graph.outputs)):
        assert [(value.name, value.dtype) for value in got] == [(value.name, value.dtype) for value in expected]
    return half


def precisions(model: ir.Model, op_type: str) -> list[str]:
    """Of the results of each node of that operator."""
    return [node.outputs[0].dtype.name for node in model.graph if node.op_type == op_type and node.outputs[0].dtype]


def casts(model: ir.Model) -> int:
    return Counter(node.op_type for node in model.graph)["Cast"]


def stored(model: ir.Model) -> dict[str, str]:
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.dtype.name for name, tensor in tensors.items() if tensor is not None}


LINEAR = "(float[N, 8] x) => (float[N, 8] y) { p = MatMul(x, w) q = Add(p, b) r = Relu(q) y = MatMul(r, v) }"


def test_weights_and_activations_are_halved_and_the_border_stays() -> None:
    model = model_of(LINEAR, w=matrix(), b=vector(), v=matrix())
    half = checked(model)
    assert stored(half) == {"w": "FLOAT16", "b": "FLOAT16", "v": "FLOAT16"}
    assert stored(model) == {"w": "FLOAT", "b": "FLOAT", "v": "FLOAT"}
    assert precisions(half, "MatMul") == ["FLOAT16"] * 2
    assert casts(half) == 2
    feeds = {"x": matrix(3)}
    for rounded in (False, True):
        np.testing.assert_allclose(run(half, feeds, rounded)[0], run(model, feeds)[0], atol=0.05)


WIDE = """(float[8, 8] x) => (float[8, 8] p, float[8, 8] y) {
    p = MatMul(x, w) t = Transpose <perm = [1, 0]> (p) q = MatMul(t, v) y = MatMul(q, v) }"""


def test_what_makes_moves_and_reads_a_wide_value_stays_in_float32() -> None:
    """Such a value was measured to leave the range of float16; what is computed of its readers is halved again."""
    model = model_of(WIDE, w=np.full((WIDTH, WIDTH), 3e4, np.float32), v=np.full((WIDTH, WIDTH), 1e-3, np.float32))
    feeds = {"x": np.ones((WIDTH, WIDTH), np.float32)}
    assert not np.isfinite(run(checked(model), feeds, rounded=True)[1]).all()
    measured, names = graph_of_ranges(model)
    ranges = list(zip(names.values(), map(float, run(measured, feeds)), strict=True))
    assert ranges[:2] == [("p", 240000), ("p", 240000)]
    assert [name for name, _ in ranges] == ["p", "p", "q", "q", "y", "y"]
    half = convert_to_fp16(model, {"p"})
    onnx.checker.check_model(ir.to_proto(half), full_check=True)
    assert precisions(half, "MatMul") == ["FLOAT", "FLOAT", "FLOAT16"]
    assert precisions(half, "Transpose") == ["FLOAT"]
    for found, expected in zip(run(half, feeds, rounded=True), run(model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_values_that_are_outputs_and_read_on_keep_their_names() -> None:
    graph = "(float[N, 8] x) => (float[N, 8] h, float[N, 8] y) { h = MatMul(x, w) n = Softmax(h) y = MatMul(n, w) }"
    model = model_of(graph, w=matrix())
    half = checked(model)
    # In: x. Out of the product: one, which is both the output and what Softmax reads.
    assert casts(half) == 4
    feeds = {"x": matrix(3)}
    for found, expected in zip(run(half, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.05)


def test_norms_and_softmax_stay_in_float32() -> None:
    graph = """(float[N, 8] x) => (float[N, 8] y) {
        a = MatMul(x, w) n = LayerNormalization <epsilon = 1e-12> (a, g, b) m = MatMul(n, w) s = Softmax(m)
        y = MatMul(s, w) }"""
    half = checked(model_of(graph, w=matrix(), g=vector(), b=vector()))
    assert precisions(half, "LayerNormalization") == precisions(half, "Softmax") == ["FLOAT"]
    assert stored(half) == {"w": "FLOAT16", "g": "FLOAT", "b": "FLOAT"}
    # A row without variance: with the epsilon in float16 it would be divided by zero.
    assert np.isfinite(run(half, {"x": np.zeros((1, WIDTH), np.float32)}, rounded=True)[0]).all()


def test_a_norm_of_single_operators_stays_in_float32() -> None:
    graph = """(float[N, 8] x) => (float[N, 8] y) {
        h = MatMul(x, w) m = ReduceMean <axes = [1]> (h) d = Sub(h, m) p = Pow(d, two)
        v = ReduceMean <axes = [1]> (p) e = Add(v, eps) r = Sqrt(e) n = Div(d, r) k = Mul(n, g) y = MatMul(k, w) }"""
    constants = {"two": np.float32(2), "eps": np.float32(1e-12)}
    half = checked(model_at(13, graph, w=matrix(), g=vector(), **{k: np.asarray(v) for k, v in constants.items()}))
    for op_type in ("ReduceMean", "Sub", "Pow", "Add", "Sqrt", "Div"):
        assert set(precisions(half, op_type)) == {"FLOAT"}, op_type
    assert precisions(half, "Mul") == ["FLOAT16"]
    # One cast into the norm, one out of it, one at each end.
    assert casts(half) == 4


def test_a_square_that_is_summed_stays_in_float32() -> None:
    graph = """(float[N, 8] x) => (float[N, 8] y) {
        h = MatMul(x, w) s = Mul(h, h) m = ReduceMean <axes = [1]> (s) r = Sqrt(m) y = Div(h, r) }"""
    half = checked(model_at(13, graph, w=np.eye(WIDTH, dtype=np.float32)))
    assert precisions(half, "Mul") == ["FLOAT"]
    got = run(half, {"x": np.full((1, WIDTH), 1000, np.float32)}, rounded=True)[0]
    np.testing.assert_allclose(got, 1, rtol=1e-3)


def test_lookups_of_buckets_are_exact() -> None:
    """Integers beyond 2048, and bounds between them, which float16 cannot tell apart."""
    graph = """(int64[N] count, float[N, 8] x) => (int64[N, L] bucket, float[N, L, 8] y) {
        row = Gather(starts, count) rows = Unsqueeze(row, one) p = Cast <to = 1> (places)
        q = Unsqueeze(p, last) begun = LessOrEqual(rows, q) i = Cast <to = 7> (begun)
        bucket = ReduceSum <keepdims = 0> (i, last)
        e = Gather(table, bucket) u = Unsqueeze(x, one) y = Add(e, u) }"""
    starts = np.sort(rng.uniform(2000, 4000, (4, 30)).astype(np.float32))
    model = model_of(
        graph,
        starts=starts,
        table=matrix(31),
        places=np.arange(2000, 4096),
        one=np.array([1]),
        last=np.array([-1]),
    )
    half = checked(model)
    assert stored(half)["starts"] == "FLOAT"
    assert stored(half)["table"] == "FLOAT16"
    assert precisions(half, "Add") == ["FLOAT16"]
    feeds = {"count": np.array([0, 3, 1]), "x": matrix(3)}
    (bucket, _), (expected, _) = run(half, feeds, rounded=True), run(model, feeds)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(bucket, expected)
    np.testing.assert_array_equal(expected[1], np.searchsorted(starts[3], np.arange(2000, 4096), "right"))


def test_positions_are_float32_until_they_meet_activations() -> None:
    graph = """(float[N, L, 8] x) => (float[N, L, 8] y) {
        s = Shape(x) l = Gather(s, one) r = Range(zero, l, step) f = Cast <to = 1> (r) c = Unsqueeze(f, last)
        angle = Mul(c, waves) sines = Sin(angle) h = MatMul(x, w) y = Add(h, sines) }"""
    waves = (1 / 10000 ** (np.arange(WIDTH) / WIDTH)).astype(np.float32)
    whole = {"one": np.array(1), "zero": np.array(0), "step": np.array(1), "last": np.array([-1])}
    model = model_of(graph, w=np.zeros((WIDTH, WIDTH), np.float32), waves=waves, **whole)
    half = checked(model)
    assert precisions(half, "Mul") == precisions(half, "Sin") == ["FLOAT"]
    assert precisions(half, "Add") == ["FLOAT16"]
    assert stored(half)["waves"] == "FLOAT"
    # The sine of 4000 rounded to float16 would be that of another angle.
    feeds = {"x": np.zeros((1, 4001, WIDTH), np.float32)}
    np.testing.assert_allclose(run(half, feeds, rounded=True)[0], run(model, feeds)[0], atol=5e-4)


def test_a_position_table_is_resampled_in_float32() -> None:
    graph = """(float[N, L, 8] x) => (float[N, L, 8] y) {
        s = Shape(x) l = Gather(s, one) r = Range(zero, l, step) f = Cast <to = 1> (r) c = Unsqueeze(f, last)
        t = Transpose <perm = [1, 0]> (table) d = Mul(c, scale) p = MatMul(d, t) h = MatMul(x, w) y = Add(h, p) }"""
    whole = {"one": np.array(1), "zero": np.array(0), "step": np.array(1), "last": np.array([-1])}
    model = model_of(graph, w=matrix(), table=matrix(WIDTH, 1), scale=np.array([0.01], np.float32), **whole)
    half = checked(model)
    assert precisions(half, "MatMul") == ["FLOAT", "FLOAT16"]
    assert precisions(half, "Transpose") == ["FLOAT"]
    assert stored(half) | whole == {"table": "FLOAT", "scale": "FLOAT", "w": "FLOAT16"} | whole


def test_texts_are_halved_from_the_first_norm_on_though_all_comes_from_integers() -> None:
    graph = """(int64[N, L] ids, int64[N, L] mask) => (float[N, L, 8] y) {
        e = Gather(words, ids) f = Cast <to = 1> (mask) k = Unsqueeze(f, last) z = Mul(e, k)
        n = LayerNormalization(z, g, b) y = MatMul(n, w) }"""
    half = checked(model_of(graph, words=matrix(50), g=vector(), b=vector(), w=matrix(), last=np.array([-1])))
    assert precisions(half, "MatMul") == ["FLOAT16"]
    graph = "(int64[N, L] ids) => (float[N, L, 8] y) { e = Gather(words, ids) p = MatMul(e, w) y = Add(p, b) }"
    half = checked(model_of(graph, words=matrix(50), b=vector(), w=matrix()))
    assert set(stored(half).values()) == {"FLOAT16"}


MASKED = """(float[N, 8] x, int64[N, 8] mask) => (float[N, 8] y) {
    h = MatMul(x, w) m = Cast <to = 1> (mask) o = Sub(one, m) hidden = Mul(o, low) s = Add(h, hidden) t = Softmax(s)
    y = MatMul(t, w) }"""


@pytest.mark.parametrize(
    ("low", "precision"), [(-10000.0, "FLOAT16"), (-np.inf, "FLOAT16"), (float(np.finfo(np.float32).min), "FLOAT")]
)
def test_masks_of_every_kind_hide(low: float, precision: str) -> None:
    """-10000 and infinity are float16's, too. float32's lowest would become infinity, and 0 of a row hidden whole."""
    graph = MASKED.replace("o = Sub(one, m) hidden = Mul(o, low)", "k = Cast <to = 9> (m) hidden = Where(k, zero, low)")
    constants = {"low": np.array(low, np.float32), "zero": np.array(0, np.float32)}
    model = model_of(graph, w=matrix(), **constants)
    half = checked(model)
    assert precisions(half, "Add") == [precision]
    feeds = {"x": matrix(2), "mask": np.array([[1] * 5 + [0] * 3, [1] * 8])}
    np.testing.assert_allclose(run(half, feeds, True)[0], run(model, feeds)[0], atol=0.02)
    if np.isfinite(low):
        feeds["mask"] = np.zeros((2, WIDTH), np.int64)
        assert np.isfinite(run(half, feeds, rounded=True)[0]).all()


def test_a_stored_mask_beyond_float16_stays_beside_what_adds_it() -> None:
    graph = "(float[8, 8] x) => (float[8, 8] y) { h = MatMul(x, w) m = Slice(mask, a, b) s = Add(h, m) y = Softmax(s) }"
    mask = np.triu(np.full((16, WIDTH), np.finfo(np.float32).min, np.float32), 1)
    half = checked(model_of(graph, w=matrix(), mask=mask, a=np.array([0]), b=np.array([8])))
    assert precisions(half, "Slice") == precisions(half, "Add") == ["FLOAT"]
    infinite = np.triu(np.full((16, WIDTH), -np.inf, np.float32), 1)
    half = checked(model_of(graph, w=matrix(), mask=infinite, a=np.array([0]), b=np.array([8])))
    assert precisions(half, "Slice") == precisions(half, "Add") == ["FLOAT16"]
    assert np.isfinite(run(half, {"x": matrix()}, rounded=True)[0]).all()


@pytest.mark.parametrize(
    ("constant", "precision"), [(1e-5, "FLOAT16"), (1e-12, "FLOAT"), (1e6, "FLOAT"), (0, "FLOAT16")]
)
def test_a_constant_that_float16_lacks_keeps_its_node(constant: float, precision: str) -> None:
    graph = "(float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) k = Max(h, low) y = MatMul(k, w) }"
    half = checked(model_of(graph, w=matrix(), low=np.array(constant, np.float32)))
    assert precisions(half, "Max") == [precision]
    assert stored(half)["low"] == precision


def test_moves_between_nodes_of_float32_do_not_round() -> None:
    graph = """(float[N, 8] x) => (float[N, 8] y, float[8, M] z) {
        s = Softmax(x) t = Transpose <perm = [1, 0]> (s) l = Log(t) z = Identity(l)
        u = Transpose <perm = [1, 0]> (s) y = MatMul(u, w) }"""
    half = checked(model_of(graph, w=matrix()))
    assert precisions(half, "Transpose") == ["FLOAT", "FLOAT16"]
    assert precisions(half, "Identity") == ["FLOAT"]
    # s for u, y at the end: x, t, l and z are float32 from end to end.
    assert casts(half) == 2


def test_a_weight_read_both_ways_is_stored_once() -> None:
    graph = """(float[N, 8] x) => (float[N, 8] y) {
        h = MatMul(x, w) n = LayerNormalization(h, g) m = Mul(n, g) y = MatMul(m, w) }"""
    half = checked(model_of(graph, w=matrix(), g=vector()))
    assert stored(half) == {"w": "FLOAT16", "g": "FLOAT"}
    assert precisions(half, "Mul") == ["FLOAT16"]


def test_an_operator_without_a_form_in_float16_stays() -> None:
    graph = "(float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) k = Det(c) a = Mul(h, k) y = Relu(a) }"
    assert precisions(checked(model_of(graph, w=matrix(), c=matrix())), "Det") == ["FLOAT16"]
    graph = "(float[N, 8] x) => (uint8[N, 8] y) { h = MatMul(x, w) y = QuantizeLinear(h, s, z) }"
    scale = {"s": np.array(0.1, np.float32), "z": np.array(7, np.uint8)}
    half = checked(model_of(graph, w=matrix(), **scale))
    assert stored(half)["s"] == "FLOAT"


LIKE = "(float[N, 8] x) => (float[N, 8] y) {{ h = MatMul(x, w) r = {} (h) z = Mul(r, zero) y = Add(z, h) }}"


@pytest.mark.parametrize(
    "operator",
    [
        *("RandomNormalLike <dtype = 1>", "RandomUniformLike <dtype = 1>", "EyeLike <dtype = 1>"),
        *("RandomNormalLike", "EyeLike", "Bernoulli <dtype = 1>"),
    ],
)
def test_what_names_float32_makes_float32(operator: str) -> None:
    model = model_of(LIKE.format(operator), w=np.eye(WIDTH, dtype=np.float32), zero=np.array(0, np.float32))
    half = checked(model)
    assert precisions(half, operator.split()[0]) == ["FLOAT" if "dtype" in operator else "FLOAT16"]
    feeds = {"x": np.full((WIDTH, WIDTH), 0.5, np.float32)}
    np.testing.assert_allclose(run(half, feeds)[0], run(model, feeds)[0])


@pytest.mark.parametrize(("opset", "attribute"), [(23, "<output_dtype = 1>"), (23, ""), (21, "")])
def test_dequantized_weights_are_halved_unless_they_name_float32(opset: int, attribute: str) -> None:
    graph = f"(float[N, 8] x) => (float[N, 8] y) {{ w = DequantizeLinear {attribute} (q, scale) y = MatMul(x, w) }}"
    quantized = {"q": np.ones((WIDTH, WIDTH), np.int8), "scale": np.array(0.5, np.float32)}
    model = model_at(opset, graph, **quantized)
    half = checked(model)
    assert precisions(half, "DequantizeLinear") == ["FLOAT" if attribute else "FLOAT16"]
    feeds = {"x": np.ones((3, WIDTH), np.float32)}
    np.testing.assert_allclose(run(half, feeds)[0], run(model, feeds)[0])


@pytest.mark.parametrize("is_stated", [True, False])
@pytest.mark.parametrize(
    "middle",
    [
        "s = SequenceConstruct(h, x) y = ConcatFromSequence <axis = 1> (s)",
        "s = SplitToSequence <axis = 1> (h) a = SequenceAt(s, one) y = MatMul(a, v)",
        "e = SequenceEmpty() s = SequenceInsert(e, h) a = SequenceAt(s, zero) y = Relu(a)",
    ],
)
def test_sequences_stay_in_float32(middle: str, is_stated: bool) -> None:
    graph = f"(float[N, 8] x) => (float[N, M] y) {{ h = MatMul(x, w) {middle} }}"
    indices = {name: np.array(index, np.int64) for name, index in (("zero", 0), ("one", 1)) if name in middle}
    weights = {"v": matrix(1, 3)} if "v)" in middle else {}
    model = model_of(graph, w=matrix(), **indices, **weights)
    if not is_stated:
        for value in (value for node in model.graph for value in node.outputs if not value.is_graph_output()):
            value.type = None
    half = checked(model)
    assert all(isinstance(node.outputs[0].type, ir.SequenceType) for node in half.graph if "s" in _names(node))
    assert precisions(half, "MatMul")[0] == "FLOAT16"
    feeds = {"x": matrix(3)}
    for rounded in (False, True):
        np.testing.assert_allclose(run(half, feeds, rounded)[0], run(model, feeds)[0], atol=0.05)


def _names(node: ir.Node) -> list[str | None]:
    return [value.name for value in node.outputs]


@pytest.mark.parametrize(
    ("operators", "kept"),
    [
        ("v, i = TopK <axis = 1> (h, three)", True),
        ("v, none = TopK <axis = 1> (h, three) i = Identity(three)", False),
        ("u = Unsqueeze(h, three) v, i = MaxPool <kernel_shape = [1]> (u)", True),
        ("v, i = Unique <axis = 0> (h)", True),
    ],
)
def test_what_makes_integers_that_are_read_stays_in_float32(operators: str, kept: bool) -> None:
    axis = 1 if "Unsqueeze" in operators else 3
    constants = {"three": np.array([axis], np.int64)} if "three" in operators else {}
    shapes = ("[N, 1, 8]", "[N, 1, 8]") if axis == 1 else ("[N, K]", "[K]" if not kept else "[N, K]")
    if "Unique" in operators:
        shapes = ("[M, 8]", "[M]")
    graph = f"(float[N, 8] x) => (float{shapes[0]} v, int64{shapes[1]} i) {{ h = MatMul(x, w) {operators} }}"
    half = checked(model_of(graph, w=matrix(), **constants))
    (op_type,) = {node.op_type for node in half.graph} & {"TopK", "MaxPool", "Unique"}
    assert precisions(half, op_type) == ["FLOAT" if kept else "FLOAT16"]
    assert precisions(half, "MatMul") == ["FLOAT16"]


def test_a_table_that_indices_choose_from_is_exact() -> None:
    graph = """(float[N, 8] x) => (float[N, 1] y) {
        s = Softmax(x) v, i = TopK <axis = 1> (s, one) y = Gather(table, i) }"""
    model = model_of(graph, one=np.array([1], np.int64), table=np.arange(WIDTH, dtype=np.float32))
    feeds = {"x": np.array([[1000.1, 1000.2, 1000.3, 5, 6, 7, 8, 1000.4]], np.float32)}
    half = checked(model)
    assert run(half, feeds)[0] == run(model, feeds)[0] == 7


def test_a_graph_without_float32_is_left_alone() -> None:
    graph = "(int64[N] x) => (int64[N] y) { y = Add(x, x) }"
    assert [node.op_type for node in checked(model_of(graph)).graph] == ["Add"]


def test_constants_in_nodes_are_weights_too() -> None:
    graph = "(float[N] x) => (float[N] y) { c = Constant <value = float {2.5}> () h = Mul(x, c) y = Relu(h) }"
    half = checked(model_of(graph))
    assert precisions(half, "Mul") == ["FLOAT16"]
    np.testing.assert_array_equal(run(half, {"x": np.array([2], np.float32)})[0], [5])


def test_a_nested_graph_is_refused() -> None:
    branches = "then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] b) { b = Abs(x) }"
    graph = f"(float[N] x, bool c) => (float[N] y) {{ y = If (c) <{branches}> }}"
    with pytest.raises(InputError, match="nested") as caught:
        convert_to_fp16(model_of(graph))
    assert caught.value.fix


def test_a_weight_beyond_float16_is_refused_by_name_when_it_is_written(tmp_path: Path) -> None:
    large = matrix(WIDTH, 1 << 14)
    large[3, 5] = -65520.0
    graph = "(float[N, 8] x) => (float[N, 16384] y) { y = MatMul(x, w) }"
    half = convert_to_fp16(model_of(graph, w=large))
    tensor = half.graph.initializers["w"].const_value
    assert tensor is not None
    with pytest.raises(InputError, match="beyond the range of float16") as caught:
        tensor.numpy()
    assert caught.value.where == "tensor w"
    assert caught.value.got == "65520"
    large[3, 5] = -65519.0  # Rounds to the largest that there is.
    ir.save(checked(model_of(graph, w=large)), tmp_path / "graph.onnx")


def test_rounding_shows_an_overflow_that_the_engine_hides() -> None:
    graph = "(float[N, 8] x) => (float[N, 8] y) { p = MatMul(x, up) q = MatMul(p, up) y = MatMul(q, down) }"
    eye = np.eye(WIDTH, dtype=np.float32)
    half = checked(model_of(graph, up=300 * eye, down=eye / 300))
    feeds = {"x": np.ones((1, WIDTH), np.float32)}
    assert np.isfinite(run(half, feeds)[0]).all(), "the engine computes float16 itself: the copy is not needed there"
    assert not np.isfinite(run(half, feeds, rounded=True)[0]).all()
