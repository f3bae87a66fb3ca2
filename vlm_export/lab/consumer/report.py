"""What the doctor finds: stages, their verdicts and the likeliest mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from vlm_export.proof.metrics import Array

Mistake = TypeVar("Mistake")
Verdict: TypeAlias = Literal["equal", "differs", "follows", "not given", "not compared"]
LEFT = 0.3
"""A mistake that leaves so little of an item's difference explains it, one that leaves more does not."""
_MOST = 3


@dataclass(frozen=True)
class Finding:
    """A likely mistake.

    Attributes:
        mistake: its name, such as "no antialias".
        evidence: the numbers that speak for it.
        fix: what to do.
        items: the texts or images that it explains.
    """

    mistake: str
    evidence: str
    fix: str
    items: tuple[str, ...] = ()


def not_finite(name: str, given: Sequence[Array], items: Sequence[str], fix: str) -> Stage | None:
    """The stage of a consumer some of whose arrays hold NaN or infinity; None where none does."""
    odd = tuple(item for item, array in zip(items, given, strict=False) if not np.isfinite(array).all())
    if not odd:
        return None
    finding = Finding("not finite", f"NaN or infinity in {len(odd)} of {len(given)}", fix)
    return Stage(name, "differs", len(given), odd, findings=(finding,))


@dataclass(frozen=True)
class Stage:
    """One stage of a consumer.

    Attributes:
        name: "ids", "pixels", "text vectors" or "image vectors".
        verdict: "follows" where a difference comes from the stage before alone.
        compared: number of texts or images.
        differing: the texts or images that differ.
        tried: those of them that mistakes were tried on.
        findings: the likeliest mistakes, what explains most first; empty where none explains the difference.
        notes: what else there is to know, one sentence each.
    """

    name: str
    verdict: Verdict
    compared: int = 0
    differing: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def unexplained(self) -> tuple[str, ...]:
        """Those that mistakes were tried on, and none explains."""
        found = {item for finding in self.findings for item in finding.items}
        return tuple(item for item in self.tried if item not in found)


@dataclass(frozen=True)
class Diagnosis:
    """What was compared, in the order in which a consumer works."""

    stages: tuple[Stage, ...]

    @property
    def wrong(self) -> tuple[Stage, ...]:
        """The stages that differ by themselves; the first comes first."""
        return tuple(stage for stage in self.stages if stage.verdict == "differs")

    @property
    def passed(self) -> bool:
        """Whether nothing that was given differs."""
        return not self.wrong

    def to_json(self) -> dict[str, Any]:
        """What `doctor --json` prints."""
        first = self.wrong[0] if self.wrong else None
        mistakes = [found.mistake for stage in self.wrong for found in stage.findings]
        return {
            "passed": self.passed,
            "first_wrong_stage": None if first is None else first.name,
            "mistakes": mistakes,
            "stages": [asdict(stage) for stage in self.stages],
        }


def explained(tried: Iterable[tuple[Mistake, Array]], before: Array, exact: float) -> list[tuple[Mistake, list[int]]]:
    """The fewest mistakes that explain most, each with the numbers of its items; the first of equals.

    Of many mistakes one comes near an item or two by chance. So one that only comes near counts where it explains at
    least as many items as are left without an explanation.

    Args:
        tried: mistakes, and float (N,) how far each item is from what the mistake makes of it.
        before: float (N,), how far the items are from what they should be.
        exact: how far items are at most that are equal.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        candidates = [(mistake, left, np.nan_to_num(1 - left / before)) for mistake, left in tried]
    candidates = [(mistake, left, np.where(share >= 1 - LEFT, share, 0)) for mistake, left, share in candidates]
    open_items, found = np.ones(len(before), bool), list[tuple[Mistake, list[int], float]]()
    while candidates and open_items.any() and len(found) < _MOST:
        totals = [float(share[open_items].sum()) for _, _, share in candidates]
        best = int(np.argmax(np.round(totals, 3)))
        if not totals[best]:
            break
        mistake, left, share = candidates[best]
        items = open_items & (share > 0)
        found.append((mistake, np.flatnonzero(items).tolist(), float(left[items].mean())))
        open_items &= ~items
    unexplained = int(open_items.sum())
    return [(mistake, items) for mistake, items, left in found if left <= exact or len(items) >= unexplained]


def nearness(left: float, exact: float) -> str:
    """How sentences call items that are so far from a mistake's."""
    return "equal" if left <= exact else "come near"
