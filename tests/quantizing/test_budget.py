"""Budgets: what `--budget` may say, and what is over one."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_export.bundle.loss import Loss, OutputLoss, over_budget
from vlm_export.errors import UsageError
from vlm_export.precision.recipes import QUANTISED
from vlm_export.quantizing.budget import DEFAULT_BUDGETS, budget_for


def loss(cosine: float, exact_match: float | None = None) -> Loss:
    return Loss({"out": OutputLoss(cosine, cosine)}, {}, None, None, exact_match, 0.25)


def test_every_precision_has_defaults() -> None:
    assert set(QUANTISED) <= set(DEFAULT_BUDGETS)


def test_what_is_stated_takes_the_place_of_its_default() -> None:
    budget = budget_for("int8", " cosine=0.999 , top10=1")
    assert budget == {**DEFAULT_BUDGETS["int8"], "cosine": 0.999, "top10": 1.0}
    assert budget_for("int8", {"exact-match": 0}) == {**DEFAULT_BUDGETS["int8"], "exact-match": 0.0}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "KEY=NUMBER"),
        (",", "KEY=NUMBER"),
        ("cosine", "KEY=NUMBER"),
        ("cosine=", "a number from 0 to 1"),
        ("cosine=nan", "a number from 0 to 1"),
        ("cosine=inf", "a number from 0 to 1"),
        ("cosine=-0.5", "a number from 0 to 1"),
        ("cosine=1.5", "a number from 0 to 1"),
        ("cosine=9e99", "a number from 0 to 1"),
        ("cosine=0x1", "a number from 0 to 1"),
        ("cosine=٠", "a number from 0 to 1"),
        ("cosine=0.9=0.9", "a number from 0 to 1"),
        ("cosine=0.9,cosine=0.8", "cosine twice"),
        ("cosin=0.9", "cosine"),
        ("\x1b[31m=0.9", "known: cosine, mean-cosine"),
        ("cosine=0.9," * 10_000, "200 characters"),
    ],
)
def test_a_hostile_budget_is_refused_in_a_sentence(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        budget_for("int8", text)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1, 2, True, "0.9", None])
def test_a_mapping_holds_numbers(number: Any) -> None:
    with pytest.raises(UsageError, match="malformed"):
        budget_for("int8", {"cosine": number})


def test_what_was_not_measured_is_over_no_budget() -> None:
    budget = {"cosine": 0.9, "exact-match": 0.5}
    assert over_budget(loss(0.95), budget) == []
    assert over_budget(loss(0.85, exact_match=0.5), budget) == [("cosine", 0.9, 0.85)]
    assert over_budget(loss(0.9, exact_match=0.4), budget) == [("exact-match", 0.5, 0.4)]
