"""Proofs: what computes the same passes, what does not fails, whatever the interface has become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from vlm_export.errors import GraphError, UsageError, VerificationError
from vlm_export.graph.edits.dtypes import set_dtype
from vlm_export.graph.edits.extract import extract, split
from vlm_export.graph.edits.io_edits import add_output, drop_output, rename_tensors
from vlm_export.graph.edits.shapes import set_shape
from vlm_export.graph.prove import program
from vlm_export.graph.prove.compare import compare
from vlm_export.graph.prove.program import Chain, ModelProgram
from vlm_export.graph.prove.prove import prove

Parse = Callable[[str, Mapping[str, Any]], ir.Model]
TEXT = """g (float[n,4] x, float[n,4] z) => (float[n,4] y, float[n,4] v) {
    a = Mul(x, w)
    b = Add(a, z)
    y = Relu(b)
    v = Exp(a)
}"""
WEIGHTS = {"w": np.linspace(0.5, 2, 4, dtype=np.float32)}


@pytest.fixture
def model(parse: Parse) -> ir.Model:
    return parse(TEXT, WEIGHTS)


@pytest.fixture
def other(parse: Parse) -> ir.Model:
    return parse(TEXT, WEIGHTS)


def test_equal_models_are_equal_to_the_last_bit(model: ir.Model, other: ir.Model) -> None:
    proof = prove(model, other)
    assert (proof.runs, proof.outputs, proof.max_abs) == (3, ("y", "v"), 0.0)


@pytest.mark.parametrize("factor", [1.0001, -1.0, np.nan])
def test_another_weight_fails(parse: Parse, model: ir.Model, factor: float) -> None:
    changed = parse(TEXT, {"w": (WEIGHTS["w"] * factor).astype(np.float32)})
    with pytest.raises(VerificationError, match="output 'y' differs"):
        prove(model, changed, tolerance=1e-6)


def test_tolerance_allows_for_rounding(parse: Parse, model: ir.Model) -> None:
    changed = parse(TEXT, {"w": (WEIGHTS["w"] * np.float32(1 + 1e-6)).astype(np.float32)})
    with pytest.raises(VerificationError):
        prove(model, changed)
    assert 0 < prove(model, changed, tolerance=1e-4).max_abs < 1e-4


def test_changed_interfaces_correspond(model: ir.Model, other: ir.Model) -> None:
    rename_tensors(other, {"x": "z", "z": "x", "y": "first"})
    with pytest.raises(VerificationError):
        prove(model, other)
    names = {"z": "x", "x": "z", "first": "y"}
    assert prove(model, other, renamed=names).outputs == ("first", "v")
    add_output(other, "b")
    drop_output(other, "v")
    with pytest.raises(VerificationError, match="lacks outputs") as caught:
        prove(model, other, renamed=names)
    assert "'v'" in caught.value.got
    proof = prove(model, other, renamed=names, may_drop_outputs=True)
    assert (proof.outputs, proof.not_compared) == (("first", "b"), ("v",))
    assert "not compared: 'v'" in str(proof)


def test_parts_are_compared_with_the_tensors_inside(model: ir.Model) -> None:
    part = extract(model, ["a", "z"], ["y"])
    assert prove(model, part, may_drop_outputs=True).outputs == ("y",)
    parts = split(model, ["a"])
    chain = Chain(ModelProgram(parts.first), ModelProgram(parts.second), parts.connections)
    assert set(prove(model, chain).outputs) == {"a", "y", "v"}
    assert prove(chain, model, may_drop_outputs=True).outputs == ("y", "v")


def test_fixed_axes_and_other_dtypes(model: ir.Model, other: ir.Model) -> None:
    set_shape(other, {"x": [7, 4], "z": [7, 4]})
    set_dtype(other, {"x": "float16", "y": "float16"})
    with pytest.raises(VerificationError, match="another dtype"):
        prove(model, other)
    assert prove(model, other, may_change_dtypes=True).max_abs == 0.0


def test_interfaces_that_do_not_correspond_are_refused(parse: Parse, model: ir.Model) -> None:
    changed = parse("g (float[n,4] x, float[n,4] q, float[n,4] r) => (float[n,4] y) { y = Sum(x, q, r) }", {})
    with pytest.raises(GraphError, match="input 'q' of the changed model stands for no tensor"):
        prove(model, changed)


def test_random_results_are_refused(parse: Parse) -> None:
    noise = parse("g (float[n,4] x) => (float[n,4] y) { y = RandomNormalLike(x) }", {})
    with pytest.raises(GraphError, match="other results at every run"):
        prove(noise, noise)


def test_inputs_that_random_values_cannot_be(parse: Parse, tmp_path: Path) -> None:
    text = "g (float[n,4] x, int64[2] s) => (float[i,j] y) { y = Reshape(x, s) }"
    picky, same = parse(text, {}), parse(text, {})
    feeds: dict[str, Any] = {"x": np.ones((3, 4), np.float32), "s": np.array([2, 6])}
    np.savez(tmp_path / "in.npz", **feeds)
    files = [tmp_path / "0.pb", tmp_path / "1.pb"]
    for path, name in zip(files, ("x", "s"), strict=True):
        path.write_bytes(numpy_helper.from_array(feeds[name]).SerializeToString())
    assert prove(picky, same, inputs=[tmp_path / "in.npz"]).runs == 1
    assert prove(picky, same, inputs=files).runs == 1
    np.savez(tmp_path / "wrong.npz", X=feeds["x"], s=feeds["s"])
    with pytest.raises(UsageError, match="no input 'X'"):
        prove(picky, same, inputs=[tmp_path / "wrong.npz"])
    with pytest.raises(UsageError, match=r"one \.npz file or several \.pb"):
        prove(picky, same, inputs=[files[0], tmp_path / "in.npz"])
    for content in (b"", b"PK\x03\x04junk", (tmp_path / "0.pb").read_bytes()):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"no \.npz of plain arrays"):
            prove(picky, same, inputs=[tmp_path / "bad.npz"])
    with (tmp_path / "bad.npz").open("wb") as file:
        np.save(file, feeds["x"])
    with pytest.raises(UsageError, match=r"no \.npz of plain arrays"):
        prove(picky, same, inputs=[tmp_path / "bad.npz"])
    impossible = parse("g (float[n,4] x, int64[1] s) => (float[i] y) { t = Add(s, big)\n y = Reshape(x, t) }",
                       {"big": np.array([1000000])})  # fmt: skip
    with pytest.raises(GraphError, match="cannot be run on random inputs") as caught:
        prove(impossible, impossible)
    assert "--inputs" in caught.value.fix


def test_large_weights_are_fed_from_where_they_lie(
    model: ir.Model, other: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "INLINE_BYTES", 1)
    monkeypatch.setattr(program, "FED_BYTES", 1)
    assert prove(model, other).runs == 3
    assert list(model.graph.initializers) == ["w"]


def test_comparison_sees_every_difference() -> None:
    nan, one = np.array([np.nan, 1], np.float32), np.array([1, 1], np.float32)
    both: Any = [one, nan]
    copies: Any = [one.copy(), nan.copy()]
    assert compare("y", nan, nan.copy(), 0.0) == 0.0
    for left, right in ((nan, one), (one, nan), (one, one.astype(np.float64)), (one, one[:1]), (one, -one)):
        with pytest.raises(VerificationError):
            compare("y", left, right, 0.5)
    with pytest.raises(VerificationError):
        compare("y", np.zeros(1, np.float32), -np.zeros(1, np.float32), 0.0)
    assert compare("y", both, copies, 0.0) == 0.0
    with pytest.raises(VerificationError):
        compare("y", both, both[:1], 0.0)
    with pytest.raises(VerificationError):
        compare("y", np.array(["a"], object), np.array(["b"], object), 1.0)


def test_an_infinite_difference_fails_any_tolerance() -> None:
    with pytest.raises(VerificationError):
        compare("y", np.array([np.inf], np.float32), np.array([1], np.float32), 1e30)


def test_models_that_do_not_run_are_named(model: ir.Model, other: ir.Model) -> None:
    proto = ir.to_proto(other)
    proto.graph.node[0].domain = "acme"
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    with pytest.raises(VerificationError, match="changed model cannot be run"):
        prove(model, ir.from_proto(proto))
