"""Which inputs and outputs of two models correspond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """By name, then by position. Inputs that have a default and stand for nothing in the original are left out.

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


def fixed_sizes(before: Program, after: Program, matched: InterfaceMatch) -> dict[str, int]:
    """Named axes of the original that the changed model fixes."""
    sizes: dict[str, int] = {}
    for name, source in matched.inputs.items():
        old, new = before.tensor(source), after.tensor(name)
        for axis, (open_size, fixed) in enumerate(zip(_dims(old), _dims(new), strict=False)):
            if isinstance(fixed, int) and not isinstance(open_size, int):
                sizes[str(open_size.value) if open_size.value is not None else f"{source}.{axis}"] = fixed
    return sizes


def _dims(value: ir.Value | None) -> Sequence[int | ir.SymbolicDim]:
    return () if value is None or value.shape is None else value.shape.dims
