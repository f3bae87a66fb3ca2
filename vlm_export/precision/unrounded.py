"""A float16 graph in float32: its own nodes and attributes, with the weights that it had before they were rounded.

Rounding hides a fault that is smaller than itself. Without it the graph must equal the Reference as closely as a
float32 graph must, so that a wrong constant, epsilon or node shows as clearly as it would there.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from vlm_export.precision.fp16_rules import DTYPE_ATTRIBUTES

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
Original = Callable[[], ir.TensorProtocol]
"""Makes an initializer's float32 tensor when it is written, one at a time: memory stays flat."""


def undo_rounding(model: ir.Model, original: Callable[[str], Original | None]) -> tuple[str, ...]:
    """Makes every float16 value of the graph float32, in place; casts between the two remain and do nothing.

    Args:
        original: name of an initializer → what makes its float32 tensor, None where that is not known.

    Returns:
        The initializers whose float32 values are not known; where there are any, the graph is of no use.
    """
    unknown = [
        name for name, value in model.graph.initializers.items() if value.dtype == _HALF and original(name) is None
    ]
    if unknown:
        return tuple(unknown)
    for name, value in model.graph.initializers.items():
        make = original(name) if value.dtype == _HALF else None
        if make is None or value.const_value is None:
            continue
        shape = ir.Shape(value.const_value.shape.numpy())
        value.const_value = ir.LazyTensor(make, dtype=_FLOAT, shape=shape, name=name)
        value.type = ir.TensorType(_FLOAT)
    for node in model.graph:
        for name, entry in list(node.attributes.items()):
            if entry.type == ir.AttributeType.INT and name in DTYPE_ATTRIBUTES and entry.value == _HALF:
                node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
            elif entry.type == ir.AttributeType.TENSOR and entry.value.dtype == _HALF:
                node.attributes[name] = ir.AttrTensor(name, _widened(entry.value))
        for value in node.outputs:
            if value.dtype == _HALF and isinstance(value.type, ir.TensorType):
                value.type = ir.TensorType(_FLOAT)
    return ()


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype("float32"), name=tensor.name)
