"""Operators that compute each element alone, so that a permutation of axes before them equals one after them."""

from __future__ import annotations

import onnx_ir as ir

# One tensor in, one out; further inputs (bounds of Clip, the model of CastLike's dtype) have no axes of their own.
UNARY = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu",
        "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
        "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
        "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
# All inputs are broadcast against one another, from the last axis on.
BROADCASTING = frozenset(
    {
        "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
        "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip


def is_elementwise(node: ir.Node, opset: int) -> bool:
    """Whether the axes of the node's tensors may be permuted together. Before opset 7 broadcasting had other rules."""
    if node.domain != "" or len(node.outputs) != 1:
        return False
    return node.op_type in UNARY or (node.op_type in BROADCASTING and opset >= 7)


def axis_inputs(node: ir.Node) -> list[int]:
    """Which inputs of an elementwise node have the axes of its output."""
    indices = range(min(1, len(node.inputs))) if node.op_type in UNARY else range(len(node.inputs))
    return [index for index in indices if node.inputs[index] is not None]
