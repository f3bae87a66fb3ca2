"""GELU's tanh form in the order of operations that runtimes know as one operator, for opsets without `Gelu`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# From this opset on there is an operator for both forms.
GELU_OPSET = 20
_CUBIC, _SCALE = 0.044715, math.sqrt(2 / math.pi)


def composed_tanh_gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), the cube as products: torch's own is a `Pow`.

    Source of the formula: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv:1606.08415). ONNX Runtime makes one
    `FastGelu` of this order (microsoft/onnxruntime `fast_gelu_fusion.cc`, first formula); of torch's it makes none.
    """
    inner = (1.0 + (_CUBIC * x) * x) * (_SCALE * x)
    return (1.0 + torch.tanh(inner)) * (0.5 * x)


@contextmanager
def lower_tanh_gelu() -> Iterator[None]:
    """Within the context, torch's GELU in its tanh form is `composed_tanh_gelu`; the exact form stays torch's."""
    original = F.gelu

    def gelu(input: Tensor, approximate: str = "none") -> Tensor:
        return composed_tanh_gelu(input) if approximate == "tanh" else original(input, approximate=approximate)

    F.gelu = gelu
    try:
        yield
    finally:
        F.gelu = original
