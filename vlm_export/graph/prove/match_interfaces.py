"""Which inputs and outputs of two models correspond."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.errors import GraphError, VerificationError
from vlm_export.graph.prove.program import Program


@dataclass(frozen=True)
class InterfaceMatch:
    """Which tensors correspond: input or output of the changed model → tensor of the original.

    Attributes:
        missing: outputs of the original that none of the changed model stands for.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    missing: tuple[str, ...]


def match_interfaces(before: Program, after: Program, renamed: Mapping[str, str]) -> InterfaceMatch:
    """Matches by name, then by position. Inputs that have a default and stand for nothing in the original are left out.

    Raises:
        GraphError: an input or output of the changed model that stands for nothing in the original.
    """
    pairs = []
    for kind, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        found: dict[str, str] = {}
        for position, (name, value) in enumerate(new.items()):
            known = renamed.get(name, name)
            if known not in old and before.tensor(known) is None:
                if kind == "input" and value.is_initializer():
                    continue
                known = _by_position(kind, name, position, list(old), list(new))
            found[name] = known
        pairs.append(found)
    inputs, outputs = pairs
    return InterfaceMatch(inputs, outputs, tuple(name for name in before.outputs if name not in outputs.values()))


def _by_position(kind: str, name: str, position: int, old: Sequence[str], new: Sequence[str]) -> str:
    if len(old) == len(new) and old[position] not in new:
        return old[position]
    raise GraphError(
        f"{kind} {name!r} of the changed model stands for no tensor of the original",
        got=f"the original's {kind}s are {list(old)}",
        fix="leave --verify out: the change is not meant to keep what is computed",
    )


def check_dtypes(before: Program, after: Program, matched: InterfaceMatch) -> None:
    """Interfaces state equal dtypes, where they state any.

    Raises:
        VerificationError: an input or output has another dtype than the tensor that it stands for.
    """
    for kind, pairs in (("input", matched.inputs), ("output", matched.outputs)):
        for name, source in pairs.items():
            old, new = before.tensor(source), after.tensor(name)
            if old is None or new is None or None in (old.dtype, new.dtype) or old.dtype == new.dtype:
                continue
            raise VerificationError(
                f"{kind} {name!r} has another dtype",
                expected=str(old.dtype),
                got=str(new.dtype),
                fix="where that is meant, change it with `graph set-dtype --verify`",
            )


def axes_of_both(
    before: Program, after: Program, matched: InterfaceMatch
) -> Iterator[tuple[AxisOfInput, int | str, int | str]]:
    """Yields axes of corresponding inputs of equal rank, named as the original's, with the size before and the size
    now.

    An open axis is called by its name, or, where it has none, by its tensor's name and its position.
    """
    for name, source in matched.inputs.items():
        old, new = before.tensor(source), after.tensor(name)
        if old is None or new is None or old.shape is None or new.shape is None or len(old.shape) != len(new.shape):
            continue
        for axis in range(len(old.shape)):
            yield AxisOfInput(source, axis), axis_label(old, source, axis), axis_label(new, name, axis)


def axis_label(value: ir.Value, name: str, axis: int) -> int | str:
    """Returns the size of an axis of an input, or what the open axis is called where sizes are drawn."""
    size = value.shape[axis] if value.shape is not None and axis < len(value.shape) else 0
    return size if isinstance(size, int) else size.value or f"{name}.{axis}"


def fixed_sizes(before: Program, after: Program, matched: InterfaceMatch) -> dict[str, int]:
    """Returns named axes of the original that the changed model fixes."""
    return {
        was: now
        for _, was, now in axes_of_both(before, after, matched)
        if isinstance(was, str) and isinstance(now, int)
    }


@dataclass(frozen=True)
class AxisOfInput:
    """An axis of an input of the model."""

    input: str
    axis: int


@dataclass(frozen=True)
class Resized:
    """Axes of inputs that change together.

    Attributes:
        old: their size before.
        new: their size, or its name.
    """

    axes: tuple[AxisOfInput, ...]
    old: int
    new: int | str

    def probes(self) -> tuple[int, ...]:
        """Returns sizes at which the new model has to work."""
        return (self.new,) if isinstance(self.new, int) else (2 * self.old, 3 * self.old)

    def __str__(self) -> str:
        names = ", ".join(f"axis {entry.axis} of {entry.input!r}" for entry in self.axes)
        return f"{names} is {self.new} instead of {self.old}"
