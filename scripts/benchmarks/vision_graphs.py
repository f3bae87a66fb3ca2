"""Other forms of a vision transformer's graph, which the benchmark `vision` measures beside what the export wrote.

Each is what one could do to the graph, by onnxruntime's own quantisers where numbers change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

Array = npt.NDArray[Any]
_MICROSOFT = "com.microsoft"
_MOVES = ("Squeeze", "Slice", "Split", "Transpose")


def write_forms(graph: Path, folder: Path, batches: Sequence[Array]) -> dict[str, Path]:
    """Name → file; batches: what the static form is calibrated on."""
    model = ir.load(graph)
    fuse_attention(model)
    fused = folder / "fused.onnx"
    ir.save(model, fused, external_data=f"{fused.name}.data")
    files = {name: folder / f"{name}.onnx" for name in ("int8-dynamic", "int8-dynamic-fused", "int8-static-fused")}
    for source, name in ((graph, "int8-dynamic"), (fused, "int8-dynamic-fused")):
        quantize_dynamic(source, files[name], **_quantiser(model))
    quantize_static(
        fused,
        files["int8-static-fused"],
        _Batches(model.graph.inputs[0].name or "", batches),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        **_quantiser(model, ActivationSymmetric=True, OpTypesToExcludeOutputQuantization=["MatMul"]),
    )
    return {"fused": fused, **files}


def _quantiser(model: ir.Model, **extra: Any) -> dict[str, Any]:
    """Products with weights, one scale for each channel, but for the last one, the projection."""
    last = [node for node in model.graph if node.op_type == "MatMul"][-1]
    return {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_exclude": [last.name],
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "extra_options": {"MatMulConstBOnly": True, "WeightSymmetric": True, **extra},
    }


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, batches: Sequence[Array]) -> None:
        self._feeds: Iterator[dict[str, Array]] = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def fuse_attention(model: ir.Model) -> None:
    """One `MultiHeadAttention` for each softmax between two products of a packed projection."""
    model.graph.opset_imports[_MICROSOFT] = 1
    for number, node in enumerate([node for node in model.graph if node.op_type == "Softmax"]):
        scores, result = _producer(node), _user(node)
        scaled = _producer(scores)
        unpacked = _producer(scaled)
        while unpacked.op_type in _MOVES:
            unpacked = _producer(unpacked)
        packed, heads = unpacked.inputs[0], unpacked.outputs[0].shape
        merged = _user(_user(result))
        (_, factor_value), size = scaled.inputs, None if heads is None else heads[-2]
        assert factor_value is not None
        factor = ir.convenience.get_const_tensor(factor_value)
        assert (unpacked.op_type, scaled.op_type, merged.op_type) == ("Reshape", "Mul", "Reshape")
        assert isinstance(size, int)
        assert factor is not None
        split = ir.node("Split", [packed], {"axis": -1, "num_outputs": 3}, num_outputs=3, name=f"split_{number}")
        attributes = {"num_heads": size, "scale": float(factor.numpy())}
        fused = ir.node("MultiHeadAttention", split.outputs, attributes, domain=_MICROSOFT, name=f"attention_{number}")
        for i, output in enumerate(split.outputs):
            output.name = f"split_{number}_{i}"
        given, made = merged.outputs[0], fused.outputs[0]
        # The quantiser leaves out what it knows no type of.
        made.name, made.type, made.shape = f"attention_{number}", given.type, given.shape
        model.graph.insert_before(merged, [split, fused])
        given.replace_all_uses_with(made)
    RemoveUnusedNodesPass()(model)


def _producer(node: ir.Node) -> ir.Node:
    found = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert found is not None
    return found


def _user(node: ir.Node) -> ir.Node:
    (use,) = node.outputs[0].uses()
    return use.node
