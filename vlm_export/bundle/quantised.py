"""How a quantised weight is stored, so that whoever reads a bundle can turn it into numbers again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from vlm_export.specs.codec import Spec, between

TRANSPOSED = ".transposed"
"""What is added to the name of a float32 weight that a quantised graph has the other way round."""

Layout: TypeAlias = Literal["channels", "product-blocks", "table-blocks"]


@dataclass(frozen=True)
class QuantisedFrom(Spec):
    """Which float32 weight an initializer of a quantised graph holds, and how.

    Attributes:
        weight: the initializer of the part's float32 graph.
        scales: the initializer that holds what a step is worth.
        zero_points: the initializer that holds which level is zero; None: the middle of the levels.
        bits: of a value.
        layout: "channels": a level is a value, with a scale for each index of `axis`, or one for all.
            "product-blocks": MatMulNBits, (outputs, blocks, bytes). "table-blocks": GatherBlockQuantized, rows as they
            are, blocks along the last axis.
        axis: of the scales, for "channels"; None: one scale.
        block_size: values of a block, for the two others.
        transposed: whether the float32 weight was transposed first.
    """

    weight: str
    scales: str
    zero_points: str | None
    bits: Annotated[int, between(4, 32)]
    layout: Layout
    axis: Annotated[int, between(0, 8)] | None = None
    block_size: Annotated[int, between(16, 4096)] | None = None
    transposed: bool = False
