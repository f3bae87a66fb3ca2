"""Signatures: the named inputs and outputs of a Part, with the symbolic axes and their allowed ranges.

Torch-free, because the manifest carries signatures to the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from vlm_export.errors import InputError

DType = Literal["float32", "float16", "int64", "int32", "uint8", "bool"]


@dataclass(frozen=True)
class Axis:
    """A symbolic axis: its name, the inclusive range of its size (`maximum` None: unbounded), and its steps.

    Sizes are multiples of `multiple_of`, and so are `minimum` and `maximum`. With `sum_of`, the size is the sum of
    those axes, in the range; with `at_most`, it is never above that axis's.
    """

    name: str
    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1
    sum_of: tuple[str, ...] = ()
    at_most: str | None = None


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor; each entry of `shape` is a size or the name of an Axis."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def concrete_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with each axis name replaced by its size in `sizes`."""
        return tuple(sizes[entry] if isinstance(entry, str) else entry for entry in self.shape)


@dataclass(frozen=True)
class Signature:
    """The ordered inputs and outputs of a Part and the axes that they name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        known = {axis.name for axis in self.axes}
        for axis in self.axes:
            if not set(axis.sum_of) <= known:
                raise ValueError(f"axis {axis.name} is the sum of unknown axes: {sorted(set(axis.sum_of) - known)}")
            if axis.at_most is not None and axis.at_most not in known:
                raise ValueError(f"axis {axis.name} is bounded by an unknown axis: {axis.at_most}")
        for tensor in (*self.inputs, *self.outputs):
            unknown = {entry for entry in tensor.shape if isinstance(entry, str)} - known
            if unknown:
                raise ValueError(f"{tensor.name} names axes that the signature lacks: {sorted(unknown)}")

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

    def to_json(self) -> dict[str, Any]:
        """The signature as JSON data; `signature_from_json` reads it back."""
        return {
            "inputs": [_json_from_tensor(tensor) for tensor in self.inputs],
            "outputs": [_json_from_tensor(tensor) for tensor in self.outputs],
            "axes": {axis.name: _json_from_axis(axis) for axis in self.axes},
        }


def _json_from_axis(axis: Axis) -> dict[str, Any]:
    steps = {} if axis.multiple_of == 1 else {"multiple_of": axis.multiple_of}
    terms = {"sum_of": list(axis.sum_of)} if axis.sum_of else {}
    bound = {} if axis.at_most is None else {"at_most": axis.at_most}
    return {"minimum": axis.minimum, "maximum": axis.maximum, **steps, **terms, **bound}


def _json_from_tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _tensor_from_json(data: Mapping[str, Any]) -> TensorSpec:
    if data["dtype"] not in get_args(DType):
        raise InputError("a signature names an unknown dtype", where=str(data["name"]), got=str(data["dtype"]))
    return TensorSpec(str(data["name"]), cast(DType, data["dtype"]), tuple(data["shape"]))


def signature_from_json(data: Mapping[str, Any]) -> Signature:
    """The Signature that `Signature.to_json` wrote; InputError when the data has another form."""
    try:
        return Signature(
            inputs=tuple(_tensor_from_json(entry) for entry in data["inputs"]),
            outputs=tuple(_tensor_from_json(entry) for entry in data["outputs"]),
            axes=tuple(
                Axis(
                    name,
                    entry["minimum"],
                    entry["maximum"],
                    entry.get("multiple_of", 1),
                    tuple(entry.get("sum_of", ())),
                    entry.get("at_most"),
                )
                for name, entry in data["axes"].items()
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("a signature in the manifest is malformed", got=repr(error)) from error
