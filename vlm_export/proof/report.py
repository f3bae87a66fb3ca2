"""What a verification found: one report for each variant of a part, as JSON and as a table for the screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vlm_export.errors import VerificationError
from vlm_export.proof.contract import CONTRACT, ContractCheck, ContractReport
from vlm_export.proof.floor import Floor
from vlm_export.proof.gates import Gate
from vlm_export.proof.metrics import Comparison, Deviation, worst_by_output, worst_of
from vlm_export.proof.points import Failure, PointResult
from vlm_export.text_display import LONGEST_FIELD, shown

_MAX_LISTED_FAILURES = 20
_HEADER = ("part", "variant", "output", "points", "max-abs", "cosine", "floor", "gate", "seen", "verdict")
_RIGHT_ALIGNED = frozenset({"points", "max-abs", "cosine", "floor", "gate", "seen"})


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


def format_table(reports: Iterable[PartReport], contract: ContractReport | None = None) -> str:
    """One line for each output: the worst numbers over all points, and how many points it failed at.

    Floor, gate and seen are the relative error of a row: measured as noise, allowed, and found. The stages of the
    contract follow, one line each. Below stands what was not run.
    """
    reports = list(reports)
    found = [_HEADER, *(row for report in reports for one in _with_unrounded(report) for row in _rows(one))]
    found += [] if contract is None else map(_contract_row, contract.checks)
    rows = [tuple(map(shown, row)) for row in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_line(row, widths) for row in [rows[0], tuple("-" * width for width in widths), *rows[1:]]]
    untold = [f"not run: {report.part} {report.variant}: {text}" for report in reports for text in report.not_run]
    if contract is not None:
        untold += [f"not run: contract: {text}" for text in contract.not_run]
    notes = [shown(note, LONGEST_FIELD) for note in untold]
    return "\n".join([*lines, *notes])


def _with_unrounded(report: PartReport) -> tuple[PartReport, ...]:
    return (report,) if report.unrounded is None else (report, report.unrounded)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        text.rjust(width) if name in _RIGHT_ALIGNED else text.ljust(width)
        for text, width, name in zip(row, widths, _HEADER, strict=True)
    ]
    return "  ".join(cells).rstrip()


def _rows(report: PartReport) -> list[tuple[str, ...]]:
    points, worst = str(len(report.points)), report.worst
    # An output that was never compared appears by its failures; a failure without a name counts for every output.
    names = dict.fromkeys([*worst, *(failure.output for _, failure in report.failures if failure.output)])
    rows = []
    for name in names or ("",):
        failed = {id(point) for point, failure in report.failures if failure.output in (name, "")}
        verdict = f"FAIL at {len(failed)}" if failed else ("pass" if name in worst else "FAIL: no points")
        numbers = (*_numbers(worst[name]), *_noise(report, name)) if name in worst else ("-",) * 5
        rows.append((report.part, report.variant, name or "-", points, *numbers, verdict))
    return rows


def _contract_row(check: ContractCheck) -> tuple[str, ...]:
    numbers = ("-",) * 2 if check.comparison is None else _numbers(check.comparison)
    verdict = f"FAIL at {len(check.failures)}" if check.failures else "pass"
    return (CONTRACT, check.variant or "-", check.stage, str(check.compared), *numbers, *("-",) * 3, verdict)


def _numbers(worst: Comparison) -> tuple[str, ...]:
    return (f"{worst.max_abs:.1e}", f"{worst.cosine:.6f}")


def _noise(report: PartReport, output: str) -> tuple[str, ...]:
    """Floor, gate and the worst that was seen of a row's relative error."""
    gate = report.floor.gate(output) if report.floor is not None else None
    seen = report.seen.get(output)
    if report.floor is None or gate is None or seen is None:
        return ("-",) * 3
    return tuple(f"{ratio.row_error:.1e}" for ratio in (report.floor.outputs[output], gate, seen))
