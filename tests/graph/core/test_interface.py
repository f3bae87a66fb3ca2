"""A graph's interface carries the Signature, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import pytest

from vlm_export.errors import VerificationError
from vlm_export.graph.core.interface import apply_signature
from vlm_export.specs.signature import Axis, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", 3)), TensorSpec("ids", "int64", ("batch", "sequence"))),
    outputs=(TensorSpec("y", "float32", ("batch", 3)),),
    axes=(Axis("batch"), Axis("sequence", 1, 9)),
)
BODY = """{
    s = Cast<to=1>(ids)
    r = ReduceSum<keepdims=1>(s)
    y = Add(x, r)
}"""
Parse = Callable[..., ir.Model]


def test_axes_get_the_names_that_hosts_read(parse: Parse) -> None:
    model = parse(f"g (float[s0, 3] x, int64[s0, s1] ids) => (float[unk, 3] y) {BODY}", {})
    apply_signature(model, SIGNATURE)
    assert [value.shape for value in model.graph.inputs] == [
        ir.Shape(("batch_size", 3)),
        ir.Shape(("batch_size", "sequence")),
    ]
    assert model.graph.outputs[0].shape == ir.Shape(("batch_size", 3))


def test_fixed_size_that_the_graph_forgot_is_restored(parse: Parse) -> None:
    model = parse(f"g (float[s0, s2] x, int64[s0, s1] ids) => (float[s0, s2] y) {BODY}", {})
    apply_signature(model, SIGNATURE)
    assert model.graph.outputs[0].shape == ir.Shape(("batch_size", 3))


def test_shape_that_is_not_known_is_stated(parse: Parse) -> None:
    model = parse(f"g (float[s0, 3] x, int64[s0, s1] ids) => (float[s0, 3] y) {BODY}", {})
    model.graph.outputs[0].shape = None
    apply_signature(model, SIGNATURE)
    assert model.graph.outputs[0].shape == ir.Shape(("batch_size", 3))


@pytest.mark.parametrize(
    ("header", "where"),
    [
        ("(float[2, 3] x, int64[s0, s1] ids) => (float[s0, 3] y)", "input x"),
        ("(float[s0, 3] x, int64[s0, 7] ids) => (float[s0, 3] y)", "input ids"),
        ("(float[s0, 3] x, int64[s0, s1] ids) => (float[1, 3] y)", "output y"),
        ("(float[s0, 4] x, int64[s0, s1] ids) => (float[s0, 4] y)", "input x"),
        ("(float[s0, 3] x, int64[s0, s1, s2] ids) => (float[s0, 3] y)", "input ids"),
        ("(float[s0, 3] x, int32[s0, s1] ids) => (float[s0, 3] y)", "input ids"),
    ],
    ids=["constant batch", "constant sequence", "constant output", "other size", "other rank", "other dtype"],
)
def test_interface_of_another_type_is_refused(parse: Parse, header: str, where: str) -> None:
    with pytest.raises(VerificationError) as caught:
        apply_signature(parse(f"g {header} {BODY}", {}), SIGNATURE)
    assert (caught.value.exit_status, caught.value.what.startswith(f"{where} of the graph")) == (1, True)
    assert caught.value.expected
    assert caught.value.got


def test_vanished_input_is_refused(parse: Parse) -> None:
    """As when the exporter took an argument for a constant."""
    model = parse("g (float[s0, 3] x) => (float[s0, 3] y) { y = Relu(x) }", {})
    with pytest.raises(VerificationError, match="inputs are not the part's") as caught:
        apply_signature(model, SIGNATURE)
    assert (caught.value.expected, caught.value.got) == ("['x', 'ids']", "['x']")


def test_inputs_in_another_order_are_refused(parse: Parse) -> None:
    model = parse(f"g (int64[s0, s1] ids, float[s0, 3] x) => (float[s0, 3] y) {BODY}", {})
    with pytest.raises(VerificationError, match="inputs are not"):
        apply_signature(model, SIGNATURE)


def test_other_outputs_are_refused(parse: Parse) -> None:
    model = parse(f"g (float[s0, 3] x, int64[s0, s1] ids) => (float[s0, 3] y) {BODY}", {})
    renamed = replace(SIGNATURE, outputs=(TensorSpec("z", "float32", ("batch", 3)),))
    with pytest.raises(VerificationError, match="outputs are not"):
        apply_signature(model, renamed)
