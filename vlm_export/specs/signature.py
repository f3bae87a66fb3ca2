"""Signatures: the named inputs and outputs of a Part, with the symbolic axes and their allowed ranges.

Torch-free, because the manifest carries signatures to the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from vlm_export.specs.codec import Spec, between, not_empty

DType = Literal["float32", "float16", "int64", "int32", "uint8", "bool"]
Size: TypeAlias = Annotated[int, between(0, (1 << 31) - 1)]


@dataclass(frozen=True)
class Axis(Spec):
    """A symbolic axis: its name, the inclusive range of its size (`maximum` None: unbounded), and its steps.

    Sizes are multiples of `multiple_of`, and so are `minimum` and `maximum`. With `sum_of`, the size is the sum of
    those axes, in the range; with `at_most`, it is never above that axis's.
    """

    name: str
    minimum: Size = 1
    maximum: Size | None = None
    multiple_of: Annotated[int, between(1)] = 1
    sum_of: tuple[str, ...] = ()
    at_most: str | None = None

    def check(self) -> None:
        if self.maximum is not None and self.maximum < self.minimum:
            raise self.refusal("maximum", f"an integer from {self.minimum}, or null")


@dataclass(frozen=True)
class TensorSpec(Spec):
    """A named tensor; each entry of `shape` is a size or the name of an Axis."""

    name: str
    dtype: DType
    shape: tuple[Size | str, ...]

    def concrete_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with each axis name replaced by its size in `sizes`."""
        return tuple(sizes[entry] if isinstance(entry, str) else entry for entry in self.shape)


Tensors: TypeAlias = Annotated[tuple[TensorSpec, ...], not_empty("at least one tensor")]


@dataclass(frozen=True)
class Signature(Spec):
    """The ordered inputs and outputs of a Part and the axes that they name."""

    inputs: Tensors
    outputs: Tensors
    axes: tuple[Axis, ...]

    def check(self) -> None:
        known = {axis.name for axis in self.axes}
        if len(known) < len(self.axes):
            raise self.refusal("axes", "axes of different names")
        for axis in self.axes:
            if not set(axis.sum_of) <= known or (axis.at_most is not None and axis.at_most not in known):
                raise self.refusal("axes", f"{axis.name!r} to be the sum of, or bounded by, axes of the signature")
        for side in ("inputs", "outputs"):
            named = {entry for tensor in getattr(self, side) for entry in tensor.shape if isinstance(entry, str)}
            if not named <= known:
                raise self.refusal(side, f"axes of the signature, not {', '.join(sorted(named - known))}")

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)

    def axis(self, name: str) -> Axis:
        """The axis of that name; KeyError when there is none."""
        return {axis.name: axis for axis in self.axes}[name]

    def related(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes with those of the axes that are sums of others, and none above the axis that bounds it."""
        sums = {axis.name: sum(sizes[term] for term in axis.sum_of) for axis in self.axes if axis.sum_of}
        found = {**sizes, **sums}
        bounds = {axis.name: axis.at_most for axis in self.axes if axis.at_most is not None and axis.name in found}
        return {**found, **{name: min(found[name], found[bound]) for name, bound in bounds.items()}}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Tensor name → position → axis name, for every symbolic entry."""
        named: dict[str, dict[int, str]] = {}
        for tensor in (*self.inputs, *self.outputs):
            named[tensor.name] = {i: entry for i, entry in enumerate(tensor.shape) if isinstance(entry, str)}
        return named
