"""What a report tells of a bundle, as data: proofs, problems, graphs, ledger, pictures, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlm_export.bundle.ledger import LedgerEntry
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import VerificationError, VlmExportError
from vlm_export.lab.plots import PlottedPoint
from vlm_export.lab.ranges import PartRanges
from vlm_export.proof.metrics import json_number


@dataclass(frozen=True)
class OutputProof:
    """One output of one variant over all points; numbers are NaN where they are unknown.

    Attributes:
        points: how many were compared.
        max_abs, cosine: the worst.
        floor, gate, seen: relative error of a row: measured as noise, allowed, and the largest found.
        failed: at how many points it failed.
        dots: the error at each point; none where only the worst was recorded.
    """

    part: str
    variant: str
    output: str
    points: int
    max_abs: float
    cosine: float
    floor: float
    gate: float
    seen: float
    failed: int
    dots: tuple[PlottedPoint, ...] = ()

    @property
    def share(self) -> float:
        """What was seen over what is allowed; NaN where either is unknown."""
        return self.seen / self.gate if self.gate > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """Without the dots."""
        return {name: json_number(value) for name, value in asdict(self).items() if name != "dots"}


@dataclass(frozen=True)
class StageProof:
    """One stage of the contract: how many images, texts or fields were compared, and what failed, a sentence each."""

    stage: str
    where: str
    variant: str
    compared: int
    passed: bool
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        by: who compared: an engine, or the export.
        problems: what does not hold, causes before what follows from them.
        not_run: what was left out, one sentence each.
        made_by: who computed what the contract expects.
    """

    by: str
    outputs: tuple[OutputProof, ...]
    stages: tuple[StageProof, ...]
    problems: tuple[VlmExportError, ...]
    not_run: tuple[str, ...] = ()
    made_by: Mapping[str, str] | None = None

    @property
    def passed(self) -> bool:
        """Something was compared and everything that was compared agrees."""
        compared = bool(self.outputs) and all(not output.failed for output in self.outputs)
        return compared and not self.problems and all(stage.passed for stage in self.stages)

    def raise_if_failed(self) -> None:
        """VerificationError that tells the first problem, of whatever kind it is."""
        if self.passed:
            return
        if not self.problems:
            raise VerificationError("nothing was compared, so nothing is proved", fix="export the model again")
        first, more = self.problems[0], len(self.problems) - 1
        what = f"{first.what} (and {more} more)" if more else first.what
        raise VerificationError(what, where=first.where, expected=first.expected, got=first.got, fix=first.fix)


@dataclass(frozen=True)
class GraphFacts:
    """A graph as it lies in the bundle.

    Attributes:
        size_bytes: of its files.
        operators: kind → number, the most frequent first.
        layer_bytes: layer of the model → bytes of its weights, in the graph's order.
        ledger: where each weight comes from; None where the bundle has no ledger.
        latency: a sentence, "" where none was measured.
        refusal: why the graph cannot be read, "" where it was.
    """

    part: str
    variant: str
    file: str
    size_bytes: int
    operators: Mapping[str, int]
    layer_bytes: Mapping[str, int]
    ledger: tuple[LedgerEntry, ...] | None
    latency: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Picture:
    """An image file of the contract and what the bundle's preparation makes of it.

    Attributes:
        original, prepared: as PNG files; None where they cannot be read or prepared.
        size: height and width that the original gives its model, in pixels.
        failure: what is wrong with the pixels, "" where they are the original's.
    """

    name: str
    original: bytes | None
    prepared: bytes | None
    size: tuple[int, int]
    failure: str = ""


@dataclass(frozen=True)
class Report:
    """All that a page tells of a bundle.

    Attributes:
        proof: of this run, or what the export recorded where nothing was run.
        recorded: what the export recorded.
        ranges: of the parts whose tensors were measured.
        compared_pixels: whether the pictures were compared with the original's pixels in this run.
    """

    bundle: OpenBundle
    proof: Proof
    recorded: Proof
    graphs: tuple[GraphFacts, ...]
    pictures: tuple[Picture, ...]
    ranges: tuple[PartRanges, ...]
    compared_pixels: bool

    def to_json(self) -> dict[str, Any]:
        """What `report --json` prints."""
        stages = [{**asdict(stage), "failures": list(stage.failures)} for stage in self.proof.stages]
        return {
            "passed": self.proof.passed,
            "problems": [problem.to_json() for problem in self.proof.problems],
            "outputs": [output.to_json() for output in self.proof.outputs],
            "contract": stages,
            "not_run": list(self.proof.not_run),
            "graphs": [
                {"part": g.part, "variant": g.variant, "size_bytes": g.size_bytes, "latency": g.latency}
                for g in self.graphs
            ],
        }
