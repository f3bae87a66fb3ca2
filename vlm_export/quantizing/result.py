"""What a quantisation gave: the manifest, and each part's loss beside the naive recipe's, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_export.bundle.loss import Loss, LossRecord, over_budget
from vlm_export.bundle.manifest import Manifest
from vlm_export.errors import VerificationError
from vlm_export.quantizing.budget import LOST, points_text

HEADER = ("part", "recipe", "size", "cosine", "mean", "golden", "top10", "words", "verdict")


@dataclass(frozen=True)
class PartLoss:
    """A part's loss at the precision that was asked for; size_bytes: of the graph with its weights."""

    part: str
    precision: str
    size_bytes: int
    record: LossRecord

    @property
    def over(self) -> list[str]:
        """What is over budget, a phrase each."""
        found = over_budget(self.record.measured, self.record.budget)
        return [
            f"{key}: expected at most {points_text(least)} lost, got {points_text(figure)}"
            if key in LOST
            else f"{key}: expected at least {least:g}, got {figure:.6g}"
            for key, least, figure in found
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "precision": self.precision,
            "size_bytes": self.size_bytes,
            "over_budget": self.over,
            "loss": self.record.to_json(),
        }


@dataclass(frozen=True)
class QuantizeResult:
    """A bundle with quantised variants.

    Attributes:
        manifest: all that the published bundle says about itself.
        losses: of each part that was quantised.
        left_out: part → why it has no variant of this precision.
    """

    manifest: Manifest
    losses: tuple[PartLoss, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """What `quantize --json` prints, but for the bundle's path."""
        return {
            "losses": [loss.to_json() for loss in self.losses],
            "left_out": self.left_out,
            "manifest": self.manifest.to_json(),
        }


class OverBudgetError(VerificationError):
    """A variant loses more than its budget; nothing was published. losses: what was measured, for the table."""

    def __init__(self, losses: Sequence[PartLoss]) -> None:
        self.losses = tuple(losses)
        worst = next(loss for loss in losses if loss.over)
        others = [loss.part for loss in losses if loss.over and loss is not worst]
        expected, _, got = worst.over[0].partition(", got ")
        also = f" (also: {', '.join(others)})" if others else ""
        part = worst.part
        super().__init__(
            f"part {part!r} loses more at {worst.precision} than its budget{also}; nothing was published",
            where=f"part {part}: {expected.partition(':')[0]}",
            expected=expected.partition(": expected ")[2],
            got=got,
            fix=_fix(worst, [loss.part for loss in losses if not loss.over]),
        )

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "losses": [loss.to_json() for loss in self.losses]}


def _fix(worst: PartLoss, within: Sequence[str]) -> str:
    finer = {"int4": "w8a16", "int8-static": "int8", "int8": "w8a16"}.get(worst.precision)
    ways = [f"take {finer}"] if finer else []
    if worst.record.searched is None:
        ways.append("let --search find the weights that must stay in float32")
    if within:
        ways.append(f"leave this part in float32: {' '.join(f'--part {name}' for name in within)}")
    return "; or ".join([*ways, "state what you accept with --budget"])


def table_rows(losses: Sequence[PartLoss]) -> list[tuple[str, ...]]:
    """Rows below `HEADER`: each part by its recipe, and by the naive one."""
    rows: list[tuple[str, ...]] = []
    for loss in losses:
        verdict = (
            "within budget" if not loss.over else f"over: {', '.join(text.partition(':')[0] for text in loss.over)}"
        )
        rows.append((loss.part, loss.precision, *_figures(loss.record.measured), verdict))
        if loss.record.naive is None:
            rows.append((loss.part, "naive", *("-",) * 6, loss.record.naive_failed))
        else:
            rows.append((loss.part, "naive", *_figures(loss.record.naive), "for comparison"))
    return rows


def accuracy_lines(losses: Sequence[PartLoss]) -> list[str]:
    """What labelled samples say of all parts together, a sentence for each accuracy."""
    lines = []
    for loss in losses[:1]:
        measured, naive = loss.record.measured, loss.record.naive
        for name, field in (
            ("zero-shot", "zero_shot"),
            ("retrieval@1, texts of an image", "retrieval_texts"),
            ("retrieval@1, images of a text", "retrieval_images"),
        ):
            found, other = getattr(measured, field), getattr(naive, field, None)
            if found is not None:
                beside = "" if other is None else f", {other.here:.2%} with the naive recipe"
                lines.append(f"{name}: {found.float32:.2%} in float32, {found.here:.2%} in {loss.precision}{beside}")
    return lines


def search_lines(losses: Sequence[PartLoss]) -> list[str]:
    """What a search left in float32, a sentence for each part."""
    lines = []
    for loss in losses:
        if (found := loss.record.searched) is not None:
            names = ", ".join(f"{name} ({cost:.2g})" for name, cost in found.costs.items())
            share = f"{found.nodes} of {found.of_nodes} nodes ({found.nodes / found.of_nodes:.0%})"
            lines.append(f"{loss.part}: {share} stay in float32 for the budget: {names}")
    return lines


def _figures(loss: Loss) -> tuple[str, ...]:
    outputs = loss.outputs.values()
    least = min((one.cosine for one in outputs), default=None)
    mean = min((one.mean_cosine for one in outputs), default=None)
    golden = min((one.cosine for one in loss.golden.values()), default=None)
    share = [f"{value:.3f}" for value in (loss.top10_texts, loss.top10_images) if value is not None]
    words = "-" if loss.exact_match is None else f"{loss.exact_match:.2f}"
    cosines = ("-" if value is None else f"{value:.5f}" for value in (least, mean, golden))
    return (f"{loss.size_share:.3f}", *cosines, "/".join(share) or "-", words)
