"""Sizes of an interpolation, which are numbers or are known only when the graph runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

# A size is a number, or, where it depends on an input's size, what the back end has for it: torch.SymInt, or a tensor.
Size: TypeAlias = "int | torch.SymInt | Tensor"
_TABLED_SIZES = 8192


@dataclass(frozen=True)
class Target:
    """What is asked of one axis.

    Attributes:
        size: of the output.
        factor: scale factor that the size comes from, None when the size was given.
        explicit: coordinates use the factor, not the ratio of the sizes.
    """

    size: Size
    factor: float | None = None
    explicit: bool = False

    @property
    def scale(self) -> float | None:
        return self.factor if self.explicit else None


def counted(n: Size) -> Tensor:
    """The size as int64 (1,) of the graph: OpenVINO expands nothing to a scalar."""
    return n.to(torch.int64).reshape(1) if isinstance(n, Tensor) else torch.full((1,), n, dtype=torch.int64)


def counted_target(source: Size, target: Target) -> Tensor:
    """The output's size as int64 (1,) of the graph."""
    if target.factor is None or isinstance(target.size, Tensor):
        return counted(target.size)
    return scaled_in_graph(source, target.factor)


def scaled_in_graph(n: Size, factor: float) -> Tensor:
    """n · factor in float64, rounded down, as torch finds the output's size: int64 (1,) of the graph.

    Not every runtime has float64 (OpenVINO computes in float32), so where float32 would miss, sizes below
    `_TABLED_SIZES` are looked up.
    """
    numbers = np.arange(_TABLED_SIZES)
    exact = np.floor(numbers * factor).astype(np.int64)
    count = counted(n)
    # Of one element, not a scalar, which the TorchScript back end would take for a number and retype.
    product = (count.to(torch.float32) * torch.tensor([factor], dtype=torch.float32)).floor().to(torch.int64)
    if (np.floor(numbers.astype(np.float32) * np.float32(factor)) == exact).all():
        return product
    tabled = torch.from_numpy(exact).index_select(0, count.clamp(max=_TABLED_SIZES - 1))
    return torch.where(count < _TABLED_SIZES, tabled, product)


def smaller(a: Size, b: Size) -> Size:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return torch.sym_min(a, b)
