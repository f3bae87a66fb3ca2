"""Which inputs and outputs of two models correspond."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.errors import GraphError, VerificationError
from vlm_export.graph.prove.program import Program


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


@dataclass(frozen=True)
class InterfaceMatch:
    """Two programs, and which of their tensors correspond: input or output of the changed one → tensor of the original.

    Attributes:
        missing: outputs of the original that none of the changed program stands for.
        may_change_dtypes: corresponding tensors may have different dtypes.
    """

    before: Program
    after: Program
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    missing: tuple[str, ...]
    may_change_dtypes: bool = False

    def changed_input(self, source: str) -> ir.Value | None:
        """Returns the changed program's input for that of the original, where its dtype may be another."""
        names = [name for name, known in self.inputs.items() if known == source and self.may_change_dtypes]
        return self.after.tensor(names[-1]) if names else None

    def check_outputs(self) -> None:
        """VerificationError where the changed program lacks outputs of the original."""
        if self.missing:
            raise VerificationError(
                "the changed model lacks outputs of the original",
                expected=str(list(self.before.outputs)),
                got=f"without {list(self.missing)}",
            )

    def check_dtypes(self) -> None:
        """VerificationError where an input or output states another dtype than the tensor that it stands for."""
        for kind, pairs in (("input", self.inputs), ("output", self.outputs)):
            for name, source in pairs.items():
                old, new = self.before.tensor(source), self.after.tensor(name)
                if old is None or new is None or None in (old.dtype, new.dtype) or old.dtype == new.dtype:
                    continue
                raise VerificationError(
                    f"{kind} {name!r} has another dtype",
                    expected=str(old.dtype),
                    got=str(new.dtype),
                    fix="where that is meant, change it with `graph set-dtype --verify`",
                )

    def resized_axes(self) -> list[Resized]:
        """Returns axes that the original fixes and that are open, or of another size, in the changed program."""
        return _changing_alike(
            (entry, was, now)
            for entry, was, now in self._axes()
            if entry.input in self.before.inputs and isinstance(was, int) and was != now and was > 0
        )

    def fixed_axes(self) -> list[Resized]:
        """Returns named axes of the original that the changed program fixes, as if they had been 1."""
        return _changing_alike(
            (entry, was, now)
            for entry, was, now in self._axes()
            if entry.input in self.before.inputs and isinstance(was, str) and isinstance(now, int) and now > 1
        )

    def fixed_sizes(self) -> dict[str, int]:
        """Returns named axes of the original that the changed program fixes."""
        return {was: now for _, was, now in self._axes() if isinstance(was, str) and isinstance(now, int)}

    def _axes(self) -> Iterator[_Change]:
        for name, source in self.inputs.items():
            old, new = self.before.tensor(source), self.after.tensor(name)
            if old is None or new is None or old.shape is None or new.shape is None or len(old.shape) != len(new.shape):
                continue
            for axis in range(len(old.shape)):
                yield AxisOfInput(source, axis), axis_label(old, source, axis), axis_label(new, name, axis)


# An axis of an input of the original, with its size, or what it is called where it is open, before and now.
_Change: TypeAlias = tuple[AxisOfInput, "int | str", "int | str"]


def _changing_alike(changes: Iterable[_Change]) -> list[Resized]:
    groups: dict[tuple[int | str, int | str], list[AxisOfInput]] = {}
    for entry, was, now in changes:
        groups.setdefault((was, now), []).append(entry)
    return [Resized(tuple(axes), was if isinstance(was, int) else 1, now) for (was, now), axes in groups.items()]


def axis_label(value: ir.Value, name: str, axis: int) -> int | str:
    """Returns the size of an axis of an input, or what the open axis is called where sizes are drawn."""
    size = value.shape[axis] if value.shape is not None and axis < len(value.shape) else 0
    return size if isinstance(size, int) else size.value or f"{name}.{axis}"


def match_interfaces(
    before: Program, after: Program, renamed: Mapping[str, str], *, may_change_dtypes: bool = False
) -> InterfaceMatch:
    """Matches by name, then by position. Inputs that have a default and stand for nothing in the original are left out.

    GraphError where another input or output of the changed model stands for nothing in the original.
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
    missing = tuple(name for name in before.outputs if name not in outputs.values())
    return InterfaceMatch(before, after, inputs, outputs, missing, may_change_dtypes)


def _by_position(kind: str, name: str, position: int, old: Sequence[str], new: Sequence[str]) -> str:
    if len(old) == len(new) and old[position] not in new:
        return old[position]
    raise GraphError(
        f"{kind} {name!r} of the changed model stands for no tensor of the original",
        got=f"the original's {kind}s are {list(old)}",
        fix="leave --verify out: the change is not meant to keep what is computed",
    )
