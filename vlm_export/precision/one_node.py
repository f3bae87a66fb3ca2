"""ONNX Runtime's quantisers on one node and its weight at a time, so that memory holds one weight and not a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir

from vlm_export.errors import InputError
from vlm_export.precision.recipes import Recipe

Quantiser = Callable[[onnx.ModelProto], onnx.ModelProto]
_LARGEST_BYTES = (1 << 31) - (1 << 20)
# So that the quantiser does not ask for a preparation of a graph of one node.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")


def one_node_model(node: ir.Node, weight: ir.TensorProtocol, position: int, opsets: dict[str, int]) -> onnx.ModelProto:
    """A model of a node alone, under its names: its weight is an initializer, its other input the model's own.

    Args:
        weight: the values, under the name that the node reads them by.
        position: of the weight among the node's inputs.

    Raises:
        InputError: the weight is larger than a model in one file can be.
    """
    if weight.nbytes > _LARGEST_BYTES:
        raise InputError(
            "a weight is too large for ONNX Runtime's quantiser",
            where=f"tensor {weight.name}",
            expected=f"at most {_LARGEST_BYTES} bytes",
            got=f"{weight.nbytes} bytes",
            fix="leave this part out with --part",
        )
    other, output = node.inputs[1 - position], node.outputs[0]
    assert other is not None
    is_table = node.op_type == "Gather"
    kind = onnx.TensorProto.INT64 if is_table else onnx.TensorProto.FLOAT
    if is_table and other.dtype == ir.DataType.INT32:
        kind = onnx.TensorProto.INT32
    rank = len(output.shape) if output.shape is not None else len(weight.shape)
    # What the quantisers look at: how many axes there are, and in a product the size that is summed over.
    axes = [f"axis_{index}" for index in range(rank)]
    inputs: list[str | int | None] = [f"size_{index}" for index in range(rank - 1 if is_table else rank)]
    if node.op_type == "MatMul":
        inputs[-1] = int(weight.shape.numpy()[-2])
    constants = [value for value in node.inputs if value is not None and value is not other and value.const_value]
    graph = onnx.helper.make_graph(
        [ir.to_proto(node)],
        "one_node",
        [onnx.helper.make_tensor_value_info(str(other.name), kind, inputs)],
        [onnx.helper.make_tensor_value_info(str(output.name), onnx.TensorProto.FLOAT, axes)],
        [
            onnx.numpy_helper.from_array(weight.numpy(), str(weight.name)),
            *(onnx.numpy_helper.from_array(v.const_value.numpy(), v.name) for v in constants if v.const_value),
        ],
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.helper.set_model_props(model, dict([_PREPARED]))
    return model


def dynamic_quantiser(*, reduce_range: bool) -> Quantiser:
    """`quantize_dynamic` with one scale for each output channel."""

    def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
        with quiet(), TemporaryDirectory(prefix="vlm-export-") as folder:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            path = Path(folder, "quantised.onnx")
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(path)

    return quantise


def static_quantiser(ranges: Mapping[str, tuple[float, float]], *, reduce_range: bool) -> Quantiser:
    """The quantiser of `quantize_static`: QuantizeLinear and DequantizeLinear by calibrated ranges.

    A product's result stays in float32, for which ONNX Runtime has one kernel; a convolution's is quantised, too.
    """

    def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
        with quiet():
            from onnxruntime.quantization import CalibrationMethod, QuantType
            from onnxruntime.quantization.calibrate import TensorsData
            from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

            names = [entry.name for entry in (*model.graph.input, *model.graph.output) if entry.name in ranges]
            limits = {name: tuple(np.float32(limit) for limit in ranges[name]) for name in names}
            work = QDQQuantizer(
                model,
                True,
                reduce_range,
                QuantType.QInt8,
                QuantType.QUInt8,
                TensorsData(CalibrationMethod.MinMax, limits),
                [],
                [],
                ["MatMul", "Conv"],
                {"OpTypesToExcludeOutputQuantization": ["MatMul"]},
            )
            work.quantize_model()
            made: onnx.ModelProto = work.model.model
            return made

    return quantise


def block_quantiser(recipe: Recipe, bits: int, *, by_steps: bool) -> Quantiser:
    """`MatMulNBitsQuantizer`, which makes MatMulNBits of MatMul and GatherBlockQuantized of Gather.

    Args:
        by_steps: the graph is fed token by token.
    """

    def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
        with quiet():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
            from onnxruntime.quantization.quant_utils import QuantFormat

            assert recipe.block_size is not None
            work = MatMulNBitsQuantizer(
                model,
                bits=bits,
                block_size=recipe.block_size,
                is_symmetric=recipe.symmetric,
                accuracy_level=(recipe.step_accuracy_level if by_steps else 0) or None,
                quant_format=QuantFormat.QOperator,
                op_types_to_quantize=("MatMul", "Gather"),
                quant_axes=(("MatMul", 0), ("Gather", 1)),
            )
            work.process()
            made: onnx.ModelProto = work.model.model
            return made

    return quantise


@contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime's quantisers set up Python's root logger and tell it every node; here they do neither."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
