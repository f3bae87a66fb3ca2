"""What a proof sees: large values, missing outputs, inputs with defaults, results that say nothing, narrow dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from vlm_export.errors import GraphError, VerificationError
from vlm_export.graph.edits.compose import compose
from vlm_export.graph.prove.program import Chain, ModelProgram
from vlm_export.graph.prove.prove import prove
from vlm_export.graph.prove.random_inputs import inputs_that_decide_sizes

Parse = Callable[[str, Mapping[str, Any]], ir.Model]
TABLE = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)


def _model(text: str, opset: int = 21) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}'))


def _differs(before: ir.Model, after: ir.Model, message: str = "output 'y' differs") -> None:
    assert prove(before, before).max_abs == 0
    with pytest.raises(VerificationError, match=message):
        prove(before, after)


@pytest.mark.parametrize("kept", [2, 16, 500])
def test_rows_of_an_embedding_that_are_lost(parse: Parse, kept: int) -> None:
    text = """g (int64[b,s] ids, int64[b,s] types) => (float[b,s,4] y) {
        e = Gather(t, ids)
        f = Gather(k, types)
        y = Add(e, f)
    }"""
    other = TABLE.copy()
    other[kept:] = 0
    _differs(parse(text, {"t": TABLE, "k": TABLE[:2]}), parse(text, {"t": other, "k": TABLE[:2]}))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_small_integers_take_all_values(parse: Parse, dtype: str) -> None:
    text = f"g ({dtype}[b,4] x) => (float[b,4] y) {{ f = Cast<to=1>(x)\n y = Clip(f, low, high) }}"
    info = np.iinfo(dtype)
    for low, high in ((info.min + 1, info.max), (info.min, info.max - 1)):
        limits = [{"low": np.float32(a), "high": np.float32(b)} for a, b in ((info.min, info.max), (low, high))]
        _differs(parse(text, limits[0]), parse(text, limits[1]))


def test_flags_take_turns_beside_integers(parse: Parse) -> None:
    text = """g (int64[b,4] x, bool c) => (int64[b,4] y) {
        y = If (c) <then_branch = t () => (int64[b,4] p) { p = Identity(x) },
                    else_branch = e () => (int64[b,4] q) { q = OPERATOR(x) }>
    }"""
    _differs(parse(text.replace("OPERATOR", "Neg"), {}), parse(text.replace("OPERATOR", "Abs"), {}))
    swapped = text.replace("then_branch", "was_then").replace("else_branch", "then_branch")
    _differs(
        parse(text.replace("OPERATOR", "Neg"), {}),
        parse(swapped.replace("was_then", "else_branch").replace("OPERATOR", "Neg"), {}),
    )


def test_integers_that_decide_sizes_stay_small(parse: Parse) -> None:
    text = """g (int64 n, int64[b,2] m, int64[b,s] ids) => (float[k,l] y) {
        r = Reshape(n, one)
        q = ReduceMax<keepdims=0>(m)
        s = Reshape(q, one)
        t = Concat<axis=0>(r, s)
        z = ConstantOfShape(t)
        e = Gather(table, ids)
        w = ReduceSum<keepdims=0>(e)
        y = Add(z, w)
    }"""
    model = parse(text, {"one": np.array([1]), "table": TABLE[:, 0]})
    assert inputs_that_decide_sizes(model) == {"n", "m"}
    assert prove(model, model).runs == 4
    looped = _model("""g (int64 n, float[2] x) => (float[2] y) {
        t = Constant<value = bool {1}>()
        y = Loop (n, t, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] w)
            { d = Identity(c) w = Neg(v) }>
    }""")
    assert inputs_that_decide_sizes(looped) == {"n"}


SCALED = "g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, OPERAND) }"
DEFAULT = np.array([2, 3], np.float32)


def test_defaults_are_overridden(parse: Parse) -> None:
    weights = {"w": DEFAULT, "v": DEFAULT}
    reads, ignores = (parse(SCALED.replace("OPERAND", name), weights) for name in ("w", "v"))
    assert prove(reads, reads).runs == 4
    _differs(reads, ignores)
    _differs(ignores, reads)


def test_defaults_are_compared_too(parse: Parse) -> None:
    one, two = (parse(SCALED.replace("OPERAND", "w"), {"w": DEFAULT * factor}) for factor in (1, 2))
    _differs(one, two)


def test_defaults_and_inputs_that_need_a_feed_correspond(parse: Parse) -> None:
    optional, required = (parse(SCALED.replace("OPERAND", "w"), weights) for weights in ({"w": DEFAULT}, {}))
    assert prove(optional, required).runs == 4
    assert prove(required, optional).runs == 3
    without = parse("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", {"w": DEFAULT})
    assert prove(without, optional).runs == 3
    proof = prove(optional, without)
    assert proof.at_default == ("w",)
    assert "only with their defaults: 'w'" in str(proof)


def test_a_default_that_must_be_what_it_is(parse: Parse) -> None:
    text = "g (float[2,3] x, int64[1] s, float[6] w) => (float[6] y) { r = Reshape(x, s)\n y = Mul(r, w) }"
    model = parse(text, {"s": np.array([6]), "w": np.ones(6, np.float32)})
    assert prove(model, model).at_default == ("s",)


def test_given_inputs_may_name_defaults(parse: Parse, tmp_path: Path) -> None:
    model = parse(SCALED.replace("OPERAND", "w"), {"w": DEFAULT})
    np.savez(tmp_path / "x.npz", x=DEFAULT)
    np.savez(tmp_path / "both.npz", x=DEFAULT, w=DEFAULT)
    assert prove(model, model, inputs=[tmp_path / "x.npz"]).runs == 2
    assert prove(model, model, inputs=[tmp_path / "both.npz"]).runs == 1


def test_results_that_say_nothing_prove_nothing(parse: Parse, tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] y, float[4] z) { z = Relu(x)\n s = Sub(x, far)\n l = Log(s)\n y = Mul(l, k) }"
    models = [parse(text, {"far": np.float32(100), "k": np.float32(factor)}) for factor in (1, 7)]
    with pytest.raises(GraphError, match="no finite value") as caught:
        prove(*models)
    assert caught.value.where == "y"
    assert "--inputs" in caught.value.fix
    np.savez(tmp_path / "in.npz", x=np.full(4, 200, np.float32))
    with pytest.raises(VerificationError, match="output 'y' differs"):
        prove(*models, inputs=[tmp_path / "in.npz"])


def test_another_dtype_is_a_difference(parse: Parse) -> None:
    plain = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", {})
    coarse = parse("g (float[2] x) => (int8[2] y) { q = Relu(x)\n y = Cast<to=3>(q) }", {})
    _differs(plain, coarse, "output 'y' has another dtype")


FIRST = "g (float[b,3] x) => (float[b,3] y, float[b,3] z) { y = Relu(x)\n z = Neg(x) }"
SECOND = "g (float[b,3] i, float[b,3] x) => (float[b,3] y, float[b,3] z) { q = Abs(i)\n y = Add(q, x)\n z = Sin(x) }"


@pytest.mark.parametrize("prefixes", [("", "b."), ("a.", ""), ("a.", "b."), ("x", "")])
@pytest.mark.parametrize("shared", [(), ("x",)])
def test_composed_models_with_equal_names(prefixes: tuple[str, str], shared: tuple[str, ...]) -> None:
    first, second = _model(FIRST), _model(SECOND)
    options: dict[str, Any] = {"prefix_first": prefixes[0], "prefix_second": prefixes[1], "shared_inputs": shared}
    whole = compose(first, second, [("y", "i")], **options)
    chain = Chain(ModelProgram(first), ModelProgram(second), [("y", "i")], shared_inputs=shared, prefixes=prefixes)
    proof = prove(chain, whole, may_drop_outputs=True)
    assert (len(proof.outputs), proof.not_compared) == (3, (f"{prefixes[0]}y",))
    swapped = compose(first, _model(SECOND.replace("Add(q, x)", "Add(q, i)")), [("y", "i")], **options)
    with pytest.raises(VerificationError, match="differs"):
        prove(chain, swapped, may_drop_outputs=True)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.BFLOAT16])
def test_dtypes_that_numpy_lacks(dtype: int) -> None:
    narrow = "bfloat16" if dtype == TensorProto.BFLOAT16 else "float8e4m3fn" if dtype == 17 else "float8e5m2"
    text = f"g (float[4] x) => ({narrow}[4] y) {{ a = Mul(x, k)\n y = Cast<to={dtype}>(a) }}"
    models = [
        _model(text.replace("k)", f"k{n})").replace("{ a", f"{{ k{n} = Constant<value_float={n}.0>() a"))
        for n in (1, 2)
    ]
    _differs(models[0], models[1])
    back = _model(f"g ({narrow}[4] x) => (float[4] y) {{ y = Cast<to=1>(x) }}")
    assert prove(back, back).runs == 3


def test_a_graph_that_is_malformed_is_said_to_be() -> None:
    cyclic = _model("g (float[1] x) => (float[1] b) { a = Add(x, b)\n b = Neg(a) }")
    with pytest.raises(GraphError, match="malformed"):
        prove(cyclic, cyclic)
    unknown = _model("g (float[1] x) => (float[1] y) { y = Nothing(x) }")
    with pytest.raises(GraphError, match="does not accept the graph"):
        prove(unknown, unknown)
