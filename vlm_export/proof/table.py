"""Verification reports as a plain-text table for the screen."""

from __future__ import annotations

from collections.abc import Iterable

from vlm_export.proof.contract import CONTRACT, ContractCheck, ContractReport
from vlm_export.proof.metrics import Comparison
from vlm_export.proof.report import PartReport
from vlm_export.text_display import LONGEST_FIELD, shown

_HEADER = ("part", "variant", "output", "points", "max-abs", "cosine", "floor", "gate", "seen", "verdict")
_RIGHT_ALIGNED = frozenset({"points", "max-abs", "cosine", "floor", "gate", "seen"})


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
