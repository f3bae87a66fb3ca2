"""What follows from weights alone is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from vlm_export.graph.core.onnxruntime_session import run_in_onnxruntime
from vlm_export.graph.passes.constant_fold import fold_all_constants, fold_constants

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((9, 6)).astype(np.float32)
ROWS = RNG.standard_normal((4, 9)).astype(np.float32)
X = RNG.standard_normal((2, 4, 6)).astype(np.float32)
Parse = Callable[..., ir.Model]
Run = Callable[..., list[Any]]
Operators = Callable[[ir.Model], list[str]]
PRODUCT = """g (float[b, 4, 6] x) => (float[b, 4, 6] y) {
    p = MatMul(rows, table)
    y = Add(x, p)
}"""


def evaluate(model: ModelProto, feeds: Mapping[str, Any]) -> Sequence[Any] | None:
    """Another engine than the one that judges."""
    return list(ReferenceEvaluator(model).run(None, dict(feeds)))


def _same_after(model: ir.Model, run: Run, feeds: dict[str, Any], folds: int, limit_bytes: int = 1 << 20) -> None:
    before = run(model, feeds)
    assert fold_constants(model, evaluate, limit_bytes).initializers == folds
    for left, right in zip(run(model, feeds), before, strict=True):
        assert left.dtype == right.dtype
        assert np.allclose(left, right, rtol=0, atol=1e-5)


def _unchanged(model: ir.Model, **options: Any) -> None:
    before = ir.to_proto(model).SerializeToString()
    assert fold_constants(model, options.pop("evaluate", evaluate), **options).initializers == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_resampled_position_embedding(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 17, 6] x) => (float[b, 17, 6] y) {
        grid = Reshape(table, grid_shape)
        channels = Transpose<perm=[2, 0, 1]>(grid)
        down = MatMul(rows, channels)
        size = Shape(down)
        across = Transpose<perm=[1, 0]>(rows)
        resized = MatMul(down, across)
        last = Transpose<perm=[1, 2, 0]>(resized)
        flat = Reshape(last, flat_shape)
        whole = Concat<axis=0>(first, flat)
        batched = Unsqueeze(whole, axes)
        y = Add(x, batched)
    }"""
    weights = {
        "table": TABLE,
        "rows": ROWS[:, :3],
        "first": TABLE[:1],
        "grid_shape": np.array([3, 3, 6]),
        "flat_shape": np.array([16, 6]),
        "axes": np.array([0]),
    }
    model = parse(text, weights)
    _same_after(model, run, {"x": RNG.standard_normal((2, 17, 6)).astype(np.float32)}, 1)
    assert operators(model) == ["Add"]
    assert {name: tuple(value.shape or ()) for name, value in model.graph.initializers.items()} == {
        "batched": (1, 17, 6)
    }


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("MatMul(rows, table)", {}),
        ("Gemm<transA=1, transB=1, alpha=2.0>(tall, wide, bias)", {"bias": TABLE[0]}),
        ('Einsum<equation="ij,jk->ik">(rows, table)', {}),
        ("Conv(images, kernel)", {}),
        ("ConvTranspose(images, kernel)", {}),
        ('Resize<mode="linear">(wide, , , size)', {"size": np.array([4, 6])}),
    ],
    ids=lambda value: value.partition("(")[0].partition("<")[0] if isinstance(value, str) else "",
)
def test_every_node_that_computes(
    node: str, weights: dict[str, Any], parse: Parse, run: Run, operators: Operators
) -> None:
    text = f"""g (float[1] x) => (float[...] y) {{
        p = {node}
        y = Mul(p, x)
    }}"""
    weights = {
        "rows": ROWS,
        "table": TABLE,
        "tall": ROWS.T.copy(),
        "wide": TABLE.T.copy(),
        "images": RNG.standard_normal((1, 2, 5, 5)).astype(np.float32),
        "kernel": RNG.standard_normal((2, 2, 3, 3)).astype(np.float32),
        **weights,
    }
    model = parse(text.replace("[...]", "[" + ", ".join("abcd"[: 4 if "images" in node else 2]) + "]"), weights)
    _same_after(model, run, {"x": np.ones(1, np.float32)}, 1)
    assert operators(model) == ["Mul"]
    assert list(model.graph.initializers) == ["p"]


def test_graph_without_such_nodes_is_left_alone(parse: Parse) -> None:
    _unchanged(
        parse(
            """g (float[b, 9] x) => (float[b, 9] y) {
            t = Transpose<perm=[1, 0]>(table)
            c = Constant<value_ints=[6, 9]>()
            r = Reshape(t, c)
            h = MatMul(x, table)
            s = Add(r, r)
            y = MatMul(h, s)
        }""",
            {"table": TABLE},
        )
    )


def test_weights_and_nodes_that_others_read_stay(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4, 6] x) => (float[b, 4, 6] y, float[b, 4, 4] z) {
        t = Transpose<perm=[1, 0]>(table)
        u = Transpose<perm=[1, 0]>(t)
        p = MatMul(rows, u)
        y = Add(x, p)
        h = MatMul(x, t)
        w = Transpose<perm=[1, 0]>(rows)
        z = MatMul(h, w)
    }"""
    model = parse(text, {"table": TABLE, "rows": ROWS})
    _same_after(model, run, {"x": X}, 1)
    assert operators(model) == ["Transpose", "Add", "MatMul", "Transpose", "MatMul"]
    assert set(model.graph.initializers) == {"table", "rows", "p"}


def test_value_that_is_also_read_on_the_way(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4, 6] x) => (float[b, 4, 6] y) {
        p = MatMul(rows, table)
        q = Relu(p)
        h = Add(x, p)
        y = Add(h, q)
    }"""
    model = parse(text, {"table": TABLE, "rows": ROWS})
    _same_after(model, run, {"x": X}, 2)
    assert operators(model) == ["Add", "Add"]
    assert set(model.graph.initializers) == {"p", "q"}


def test_value_that_a_branch_reads(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4, 6] x, bool c) => (float[b, 4, 6] y) {
        p = MatMul(rows, table)
        y = If(c) <
            then_branch = left () => (float[b, 4, 6] l) { l = Add(x, p) },
            else_branch = right () => (float[b, 4, 6] r) { q = MatMul(rows, table) r = Sub(x, q) }
        >
    }"""
    for chosen in (True, False):
        model = parse(text, {"table": TABLE, "rows": ROWS})
        _same_after(model, run, {"x": X, "c": np.array(chosen)}, 1)
        assert operators(model) == ["If"]


def test_branches_stay(parse: Parse, run: Run, operators: Operators) -> None:
    """They may read what is no input of the node."""
    text = """g (float[b, 4, 6] x) => (float[b, 4, 6] y) {
        p = MatMul(rows, table)
        largest = ReduceMax<keepdims=0>(p)
        c = Greater(largest, zero)
        y0 = If(c) <
            then_branch = left () => (float[b, 4, 6] l) { l = Relu(x) },
            else_branch = right () => (float[b, 4, 6] r) { r = Neg(x) }
        >
        y = Add(y0, x)
    }"""
    model = parse(text, {"table": TABLE, "rows": ROWS, "zero": np.zeros((), np.float32)})
    _same_after(model, run, {"x": X}, 1)
    assert operators(model) == ["If", "Add"]


def test_what_is_too_large_stays(parse: Parse, run: Run, operators: Operators) -> None:
    """The sizes are those of p, 96 bytes, and of what comes after or before it."""
    after = """g (float[b, 4, 6] x) => (float[b, 4, 6] y) {
        p = MatMul(rows, table)
        e = Expand(p, shape)
        m = ReduceMean(e)
        h = Add(x, p)
        y = Add(h, m)
    }"""
    weights = {"rows": ROWS, "table": TABLE, "shape": np.array([50, 4, 6])}
    model = parse(after, weights)
    _same_after(model, run, {"x": X}, 1, limit_bytes=1000)
    assert operators(model) == ["Expand", "ReduceMean", "Add", "Add"]
    before = PRODUCT.replace("table)", "wide)").replace("p =", "wide = Transpose<perm=[1, 0]>(tall)\n p =")
    _unchanged(parse(before, {"rows": ROWS, "tall": TABLE.T.copy()}), limit_bytes=200)
    _same_after(parse(PRODUCT, {"rows": ROWS, "table": TABLE}), run, {"x": X}, 1, limit_bytes=96)


def test_what_is_too_large_is_not_even_computed(parse: Parse) -> None:
    def fail(model: ModelProto, feeds: Mapping[str, Any]) -> None:
        raise AssertionError("computed")

    _unchanged(parse(PRODUCT, {"rows": ROWS, "table": TABLE}), evaluate=fail, limit_bytes=95)


def test_unknown_sizes_are_limited_too(parse: Parse) -> None:
    model = parse(PRODUCT, {"rows": ROWS, "table": TABLE})
    next(node for node in model.graph if node.op_type == "MatMul").outputs[0].shape = None
    _unchanged(model, limit_bytes=95)
    text = PRODUCT.replace("p =", "table = Transpose<perm=[1, 0]>(wide)\n p =")
    model = parse(text, {"rows": ROWS, "wide": TABLE.T.copy()})
    next(node for node in model.graph if node.op_type == "Transpose").outputs[0].shape = None
    _unchanged(model, limit_bytes=200)


def test_the_limit_holds_for_all_values_together(parse: Parse, run: Run, operators: Operators) -> None:
    text = """g (float[b, 4, 6] x) => (float[b, 4, 6] y) {
        p = MatMul(rows, table)
        q = MatMul(rows, other)
        h = Add(x, p)
        y = Mul(h, q)
    }"""
    weights = {"rows": ROWS, "table": TABLE, "other": TABLE + 1}
    model = parse(text, weights)
    _same_after(model, run, {"x": X}, 1, limit_bytes=191)
    assert operators(model) == ["MatMul", "Add", "Mul"]
    model = parse(text, weights)
    _same_after(model, run, {"x": X}, 2, limit_bytes=192)
    assert operators(model) == ["Add", "Mul"]


def test_outputs_of_the_graph_stay(parse: Parse) -> None:
    text = """g (float[b, 4, 6] x) => (float[b, 4, 6] y, float[4, 6] p) {
        p = MatMul(rows, table)
        y = Add(x, p)
    }"""
    _unchanged(parse(text, {"rows": ROWS, "table": TABLE}))


def test_default_of_an_input_is_no_constant(parse: Parse) -> None:
    _unchanged(parse(PRODUCT.replace("] x)", "] x, float[4, 9] rows)"), {"rows": ROWS, "table": TABLE}))


def test_random_numbers_stay_random(parse: Parse) -> None:
    text = PRODUCT.replace("p =", "rows = RandomNormal<shape=[4, 9]>()\n p =")
    _unchanged(parse(text, {"table": TABLE}))


def test_types_that_numpy_lacks_stay(parse: Parse) -> None:
    weights = {"rows": ROWS.astype(ml_dtypes.bfloat16), "table": TABLE.astype(ml_dtypes.bfloat16)}
    _unchanged(parse(PRODUCT.replace("float[", "bfloat16["), weights))


def test_what_the_engine_cannot_run_stays(parse: Parse) -> None:
    _unchanged(parse(PRODUCT, {"rows": ROWS, "table": TABLE}), evaluate=lambda model, feeds: None)


@pytest.mark.parametrize("dtype", ["FLOAT8E4M3FN", "FLOAT8E5M2", "BFLOAT16", "INT4", "STRING"])
def test_what_the_engine_gives_as_something_else_stays(dtype: str) -> None:
    number = int(ir.DataType[dtype])
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[3] x) => (float[3] y) <float[3] k = {{1.3, 2.7, -3.1}}> {{
        n = Cast<to={number}>(k)
        w = Cast<to=1>(n)
        y = Add(x, w)
    }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    x = np.zeros(3, np.float32)
    expected = run_in_onnxruntime(ir.to_proto(model), {"x": x})
    assert expected is not None
    fold_all_constants(model)
    got = run_in_onnxruntime(ir.to_proto(model), {"x": x})
    assert got is not None
    assert np.array_equal(got[0], expected[0])


@pytest.mark.parametrize("op_type", ["Div", "Mod"])
@pytest.mark.parametrize(("dividend", "divisor"), [(1, 0), (-(2**31), -1)])
def test_divisions_that_end_the_process_are_not_run(parse: Parse, op_type: str, dividend: int, divisor: int) -> None:
    text = f"g (int32[1] x) => (int32[1] y) {{ q = {op_type}(a, b)\n y = Add(x, q) }}"
    model = parse(text, {"a": np.array([dividend], np.int32), "b": np.array([divisor], np.int32)})
    assert fold_all_constants(model).initializers == 0
