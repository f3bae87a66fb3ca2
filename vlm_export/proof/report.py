"""The result of verifying one variant of a part: for the screen, for the manifest, and as an error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vlm_export.errors import VerificationError
from vlm_export.proof.floor import Floor
from vlm_export.proof.gates import Gate
from vlm_export.proof.metrics import Comparison, Deviation, worst_by_output, worst_of
from vlm_export.proof.points import Failure, PointResult

_MAX_LISTED_FAILURES = 20


@dataclass(frozen=True)
class PartReport:
    """All points of one variant.

    Attributes:
        part, variant: e.g. "vision", "fp32".
        gate: the limits that applied.
        points: in the order in which they ran.
        reference: who computed what was expected.
        engine: name and version of what computed what was got.
        not_run: what a verification usually does and this one did not, each with its reason.
        floor: the measured noise that the outputs were judged by, None where none is known.
        unrounded: of a float16 graph, its nodes in float32 with weights that were not rounded.
    """

    part: str
    variant: str
    gate: Gate
    points: tuple[PointResult, ...]
    reference: str
    engine: str
    not_run: tuple[str, ...] = ()
    floor: Floor | None = None
    unrounded: PartReport | None = None

    @property
    def passed(self) -> bool:
        """Something was compared and nothing failed."""
        unrounded = self.unrounded is None or self.unrounded.passed
        return any(point.comparisons for point in self.points) and not self.failures and unrounded

    @property
    def failures(self) -> tuple[tuple[PointResult, Failure], ...]:
        """Every failure with its point, in order."""
        return tuple((point, failure) for point in self.points for failure in point.failures)

    @property
    def worst(self) -> dict[str, Comparison]:
        """Output name → each number's worst value over all points."""
        names = dict.fromkeys(name for point in self.points for name in point.comparisons)
        return {name: worst_of(p.comparisons[name] for p in self.points if name in p.comparisons) for name in names}

    @property
    def seen(self) -> dict[str, Deviation]:
        """Output name → the worst deviation over the points that the floor judged."""
        return worst_by_output(point.deviations for point in self.points)

    def with_unrounded(self, found: PartReport | str) -> PartReport:
        """This report with that of the graph in float32, or with the reason why there is none."""
        if isinstance(found, str):
            return replace(self, not_run=(*self.not_run, found))
        return replace(self, unrounded=found)

    def first_failure(self) -> str:
        """The first failure and its point, or that there is none."""
        if not self.failures and self.unrounded is not None and not self.unrounded.passed:
            return f"in float32: {self.unrounded.first_failure()}"
        if not self.failures:
            return "nothing was compared" if not self.passed else "no failure"
        point, failure = self.failures[0]
        return f"{point}: {failure}"

    def to_json(self) -> dict[str, Any]:
        """The report as strict JSON data, for the manifest and `--json`."""
        kinds = [point.kind for point in self.points]
        axes = dict.fromkeys(axis for point in self.points for axis in point.sizes)
        return {
            "part": self.part,
            "variant": self.variant,
            "passed": self.passed,
            "gate": self.gate.to_json(),
            "reference": self.reference,
            "engine": self.engine,
            "points": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "seeds": sorted({point.seed for point in self.points if point.seed is not None}),
            "axes": {axis: sorted({p.sizes[axis] for p in self.points if axis in p.sizes}) for axis in axes},
            "not_run": list(self.not_run),
            "floor": None if self.floor is None else self.floor.to_json(self.seen),
            "worst": {name: comparison.to_json() for name, comparison in self.worst.items()},
            "failures": [f"{point}: {failure}" for point, failure in self.failures[:_MAX_LISTED_FAILURES]],
            "failure_count": len(self.failures),
            "unrounded": None if self.unrounded is None else self.unrounded.to_json(),
        }

    def raise_if_failed(self) -> None:
        """VerificationError with the first failing output, its sizes, and expected against got numbers."""
        if self.passed:
            return
        if not self.failures and self.unrounded is not None:
            self.unrounded.raise_if_failed()
        title = f"part {self.part!r} at {self.variant} does not compute what the reference computes"
        if not self.failures:
            raise VerificationError(
                f"part {self.part!r} at {self.variant} was compared at no point",
                expected="at least one point with outputs to compare",
                got=f"{len(self.points)} points",
            )
        point, first = self.failures[0]
        same = [failure.text for failure in point.failures if failure.output == first.output]
        failed = sum(1 for result in self.points if result.failures)
        raise VerificationError(
            f"{title}: {failed} of {len(self.points)} points failed",
            where=f"output {first.output}, at {point}" if first.output else f"at {point}",
            expected=f"equal to the {self.reference} within the {self.gate.name} gate and the measured noise",
            got="; ".join(same),
            fix="this graph must not be used; export again with the other back end (--exporter) or another --opset",
        )
