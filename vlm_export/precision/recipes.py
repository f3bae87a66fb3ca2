"""What each quantised precision changes of a graph and what it keeps: data alone. docs/numerics.md says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["dynamic", "weight-only", "static"]
QUANTISED: tuple[str, ...] = ("int8", "int8-static", "w8a16", "int4")
"""The precisions that `quantize` makes, by the words of its command line."""


@dataclass(frozen=True)
class Recipe:
    """How a float32 graph becomes one of fewer bits, by ONNX Runtime's quantisers.

    Attributes:
        precision: the variant's name.
        kind: "dynamic" takes the range of activations anew in each run, "static" from calibration, "weight-only"
            computes with activations as they are.
        bits: of a weight.
        block_size: values that share a scale, along the axis that a product sums over; None: one scale a channel.
        symmetric: whether zero stays zero without a zero point.
        step_accuracy_level: of MatMulNBits in graphs that are fed token by token: 0 leaves activations in float32; 4
            lets an engine round them to 8 bits, a block at a time. ONNX Runtime has its fast kernel for one row there.
        table_bits: of tables that rows are looked up in; None: they stay as they are.
        smooths: whether outliers of norms move into the weights behind them first (`precision/smoothing.py`).
        convolutions: whether convolutions are quantised but for those that read an input of the graph.
        least_values: weights of fewer values stay in float32: they hold nothing worth saving.
        kept_share: the last products before the outputs (a projection, a pooling head's end) stay in float32 where they
            hold at most this share of the products' values.
        tells: a sentence without its end, for the record and the documentation.
    """

    precision: str
    kind: Kind
    bits: int
    tells: str
    block_size: int | None = None
    symmetric: bool = True
    step_accuracy_level: int = 0
    table_bits: int | None = None
    smooths: bool = False
    convolutions: bool = False
    least_values: int = 1024
    kept_share: float = 0.02


RECIPES: Mapping[str, Recipe] = {
    recipe.precision: recipe
    for recipe in (
        Recipe(
            "int8",
            "dynamic",
            8,
            "products with weights of 8 bits, one scale for each output channel, and activations of 8 bits whose range "
            "is taken in each run; rows of tables have 8 bits and a scale each",
            table_bits=8,
        ),
        Recipe(
            "int8-static",
            "static",
            8,
            "products and convolutions with weights of 8 bits, one scale for each output channel, and activations of 8 "
            "bits whose range was calibrated, once outliers moved from norms into weights; rows of tables have 8 bits "
            "and a scale each",
            table_bits=8,
            smooths=True,
            convolutions=True,
        ),
        Recipe(
            "w8a16",
            "weight-only",
            8,
            "products with weights of 8 bits, one scale and one zero point for 64 values, and activations as they are; "
            "rows of tables have 8 bits and a scale each",
            block_size=64,
            symmetric=False,
            table_bits=8,
        ),
        Recipe(
            "int4",
            "weight-only",
            4,
            "products and tables with weights of 4 bits, one scale and one zero point for 32 values, and activations "
            "as they are, or of 8 bits in decoders with a cache",
            block_size=32,
            step_accuracy_level=4,
            symmetric=False,
            table_bits=4,
        ),
    )
}
