"""The least that a quantised variant must keep: the defaults, and what `--budget` says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from vlm_export.bundle.loss import BUDGET_KEYS, BudgetKey
from vlm_export.errors import UsageError, suggestion

DEFAULT_BUDGETS: Mapping[str, Mapping[BudgetKey, float]] = {
    "int8": {"cosine": 0.98, "mean-cosine": 0.995, "top10": 0.8, "exact-match": 0.75},
    "int8-static": {"cosine": 0.95, "mean-cosine": 0.99, "top10": 0.8, "exact-match": 0.75},
    "w8a16": {"cosine": 0.995, "mean-cosine": 0.999, "top10": 0.9, "exact-match": 0.9},
    "int4": {"cosine": 0.85, "mean-cosine": 0.97, "top10": 0.7, "exact-match": 0.5},
}
"""Precision → what is demanded where the user says nothing; docs/numerics.md shows it."""

LOST: tuple[BudgetKey, ...] = ("zero-shot", "retrieval@1")
"""Keys of accuracies: what a budget states is what may be lost, in percentage points."""
_POINTS: tuple[BudgetKey, ...] = (*LOST, "exact-match", "top10")

_NUMBER = re.compile(r"(?:0|1|0?\.[0-9]{1,12}|1\.0{1,12})")
_PERCENTAGE_POINTS = re.compile(r"(100|[0-9]{1,2}(?:\.[0-9]{1,12})?)pp")
_MAX_CHARACTERS = 200
_DIGITS = 9  # as `Accuracy.kept` has


def budget_for(precision: str, stated: str | Mapping[str, float] | None) -> dict[BudgetKey, float]:
    """The precision's defaults, with what the user states in their place.

    Args:
        stated: "cosine=0.999,top10=0.9,zero-shot=1pp", or the same as a mapping of the least that must be kept
            (zero-shot: 0.99); None for the defaults.

    Raises:
        UsageError: an unknown or repeated key, or a number that is none from 0 to 1, nor so many percentage points of
            a key that has them.
    """
    return dict(DEFAULT_BUDGETS[precision]) | stated_budget(stated)


def stated_budget(stated: str | Mapping[str, float] | None) -> dict[BudgetKey, float]:
    """What the user states alone; arguments and errors as in `budget_for`."""
    if stated is None:
        return {}
    return _parsed(stated) if isinstance(stated, str) else _checked(stated)


def _parsed(text: str) -> dict[BudgetKey, float]:
    if len(text) > _MAX_CHARACTERS:
        raise _refusal(text, f"at most {_MAX_CHARACTERS} characters", f"{len(text)} characters")
    found: dict[BudgetKey, float] = {}
    for entry in text.split(","):
        name, equals, number = entry.strip().partition("=")
        if not equals:
            raise _refusal(text, "KEY=NUMBER, separated by commas", repr(entry))
        key = _key(name.strip())
        if key in found:
            raise _refusal(text, "each key once", f"{key} twice")
        found[key] = _least(text, key, number.strip())
    return found


def _least(text: str, key: BudgetKey, number: str) -> float:
    """The share that must be kept, of one as it is or of percentage points that may be lost."""
    points = _PERCENTAGE_POINTS.fullmatch(number)
    if points is not None and key in _POINTS:
        return round(1 - float(points[1]) / 100, _DIGITS)
    if key in LOST:
        raise _refusal(text, f"{key}: percentage points that may be lost, such as 1pp", repr(number))
    if not _NUMBER.fullmatch(number):
        expected = "a number from 0 to 1, such as 0.999"
        raise _refusal(text, f"{key}: {expected}{', or 1pp' if key in _POINTS else ''}", repr(number))
    return float(number)


def _checked(stated: Mapping[str, float]) -> dict[BudgetKey, float]:
    found: dict[BudgetKey, float] = {}
    for name, number in stated.items():
        key = _key(name)
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not is_number or not 0 <= number <= 1:
            raise _refusal(key, "a number from 0 to 1, such as 0.999", repr(number))
        found[key] = float(number)
    return found


def _key(name: str) -> BudgetKey:
    for key in BUDGET_KEYS:
        if key == name:
            return key
    raise UsageError(f"a budget has no key {name!r:.60}", where="--budget", fix=suggestion(name[:60], BUDGET_KEYS))


def _refusal(where: str, expected: str, got: str) -> UsageError:
    place = f"--budget {where}"[:100]
    return UsageError("a budget is malformed", where=place, expected=expected, got=got[:100])


def points_text(kept: float) -> str:
    """What is lost of an accuracy, for people: 0.995 is `0.5pp`."""
    return f"{100 * (1 - kept):.3g}pp"
