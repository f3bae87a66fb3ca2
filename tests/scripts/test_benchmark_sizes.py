"""What the benchmarks of sizes and of a real sentence encoder conclude from their figures."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks import outliers, sizes


def model(precision: str, share: float, *, reached: bool) -> dict[str, Any]:
    given = {"label": "a model", "precision": precision, "mib": 1.0, "share": share, "goal": "0.52"}
    return {**given, "reached": reached}


def test_one_model_above_its_goal_misses_it() -> None:
    within, above = model("fp16", 0.5, reached=True), model("int8", 0.4, reached=False)
    part = {"label": "a part", "precision": "int8", "mib": 1.0, "share": 0.4, "kept": "projection"}
    assert sizes.report_from_rows([within], [part], ["int8"]).reached
    found = sizes.report_from_rows([within, above], [part], ["int8"])
    assert not found.reached
    assert found.conclusion == "above it: a model in int8: 0.400."


@pytest.mark.parametrize(("share", "reached"), [(0.99, True), (0.989, False)])
def test_the_best_of_8_bits_is_held_against_the_goal(share: float, reached: bool) -> None:
    def row(label: str, top10: float) -> dict[str, Any]:
        return {"label": label, "size": 0.25, "cosine": 0.99, "mean": 0.99, "top10": top10}

    rows = [row("int8", 0.9), row("int8-static", share), row("w8a16", 1.0), row("naive int8", 0.8)]
    found = outliers.report_from_rows("an encoder", rows, 600)
    assert found.reached is reached
    assert "naive recipe keeps 0.8000" in found.conclusion
