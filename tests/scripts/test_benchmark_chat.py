"""The benchmark of answers: its PyTorch sides compute what nanoVLM does, and its page counts what it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.chat import OURS, SIDES, report_from_results
from benchmarks.chat_original import OriginalNanoVlm
from benchmarks.report import write_report

from vlm_export.checkpoint.open import open_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "data" / "nanovlm" / "222m"


@pytest.mark.parametrize("cached", [True, False])
def test_the_original_gives_the_recorded_ids(cached: bool, nanovlm_record: Callable[[str], Any]) -> None:
    record = nanovlm_record("222m")
    model = OriginalNanoVlm(open_checkpoint(str(CHECKPOINT)), cached=cached)
    ids: list[int] = []
    with torch.inference_mode():
        pixels, text = (torch.from_numpy(record[f"input.{name}"].copy()) for name in ("pixel_values", "input_ids"))
        logits, cache, fed = model.first_logits(pixels, text)
        for _ in range(12):
            token = logits.argmax(-1, keepdim=True)
            ids.append(int(token))
            logits, cache, fed = model.next_logits(token, cache, fed)
    assert ids == record["output.generated_ids_greedy"][0].tolist()


def measured(first: float, token: float, peak: int, ids: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Three rounds, one of them disturbed."""
    seconds = (first, 9.0, first)
    common = {"ids": list(ids), "token_seconds": token, "peak_bytes": peak << 20, "anonymous_bytes": peak << 19}
    return [{"first_seconds": value, **common} for value in seconds]


@pytest.mark.parametrize(
    ("ours", "reached"),
    [
        (measured(0.1, 0.02, 100), True),
        (measured(0.11, 0.02, 100), False),
        (measured(0.1, 0.03, 100), False),
        (measured(0.1, 0.02, 201), False),
        (measured(0.1, 0.02, 100, ids=(1, 3)), False),
    ],
)
def test_the_goal_is_all_of_it(ours: list[dict[str, Any]], reached: bool, tmp_path: Path) -> None:
    others = {label: measured(0.14, 0.03, 200) for label in SIDES if label != OURS}
    report = report_from_results("tiny", {OURS: ours, **others}, 3, 2, 7, 2)
    assert report.reached == reached
    page = write_report(report, tmp_path, "chat-tiny", "measure")
    assert "7 tokens of text, 2 new tokens" in page
    assert "again: `measure`" in page
    assert (tmp_path / "chat-tiny.json").is_file()
