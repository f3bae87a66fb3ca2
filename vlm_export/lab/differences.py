"""What a comparison found, as data: differences in the order in which a person should read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from vlm_export.errors import VerificationError
from vlm_export.proof.metrics import json_number

Section = Literal[
    "parts",
    "interface",
    "model",
    "preparation",
    "tokenizer",
    "tasks",
    "files",
    "contract",
    "opset",
    "structure",
    "weights",
    "outputs",
    "tolerances",
]
"""Kinds of differences. Causes come before what follows from them."""

SECTIONS: tuple[Section, ...] = get_args(Section)
_MOST_NAMED = 3


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        where: a part and a module of it (`text.blocks.7.mlp`), a file, or a field of the manifest.
        what: a sentence without its end.
        left, right: what either side has, "" where the sentence says it.
    """

    section: Section
    where: str
    what: str
    left: str = ""
    right: str = ""

    def __str__(self) -> str:
        sides = f": {self.left or 'none'} → {self.right or 'none'}" if self.left or self.right else ""
        return f"{self.where}: {self.what}{sides}" if self.where else f"{self.what}{sides}"


@dataclass(frozen=True)
class OutputComparison:
    """One output on the same inputs.

    Attributes:
        where: part, variant and name.
        samples: how many rows were compared.
        max_abs: largest difference, nan where shapes differ.
        bound: how large it may be.
        cosine: smallest over the rows.
        worst_sample: index of the row with the largest difference; None where nothing differs or rows cannot be told.
        refusal: why the right side could not be run, "" where it was.
    """

    where: str
    samples: int
    max_abs: float
    bound: float
    cosine: float
    worst_sample: int | None
    refusal: str = ""

    @property
    def equal(self) -> bool:
        """Whether the difference is within the bound."""
        return self.max_abs <= self.bound


@dataclass(frozen=True)
class Measurement:
    """A figure of both sides that is no difference: bytes, milliseconds."""

    name: str
    left: float
    right: float
    unit: str

    @property
    def ratio(self) -> float | None:
        """Right over left; None where left is nothing."""
        return self.right / self.left if self.left else None


@dataclass(frozen=True)
class Diff:
    """All that was compared of two sides.

    Attributes:
        left, right: what was compared, as the user named it.
        tolerance: the stated one.
        differences: in the order of `SECTIONS`, and of the graphs.
        outputs: every output that was run.
        measured: sizes, and latencies where they were asked for.
        not_run: what was not compared, one sentence each with its reason.
    """

    left: str
    right: str
    tolerance: float
    differences: tuple[Difference, ...]
    outputs: tuple[OutputComparison, ...] = ()
    measured: tuple[Measurement, ...] = ()
    not_run: tuple[str, ...] = field(default_factory=tuple)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """What `diff --json` prints."""
        outputs = [{**_strict(asdict(entry)), "equal": entry.equal} for entry in self.outputs]
        measured = [{**asdict(entry), "ratio": entry.ratio} for entry in self.measured]
        return {
            "equal": self.equal,
            "left": self.left,
            "right": self.right,
            "tolerance": self.tolerance,
            "differences": [asdict(difference) for difference in self.differences],
            "outputs": outputs,
            "measured": measured,
            "not_run": list(self.not_run),
        }

    def raise_if_different(self) -> None:
        """VerificationError that names the first difference."""
        if self.equal:
            return
        first = self.differences[0]
        count = len(self.differences)
        raise VerificationError(
            f"{count} difference{'s' if count > 1 else ''}, the first in {first.section}",
            where=first.where,
            expected=first.left or "no difference",
            got=f"{first.what}: {first.right}" if first.right else first.what,
        )


def in_order(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """Sorted by section; the order within one stays."""
    return tuple(sorted(differences, key=lambda difference: SECTIONS.index(difference.section)))


def named(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    items = list(dict.fromkeys(names))
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more


def _strict(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: json_number(value) for name, value in data.items()}
