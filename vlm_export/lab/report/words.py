"""Figures and sentences that the page and its summary share."""

from __future__ import annotations

import math

from vlm_export.lab.report.findings import OutputProof, Report

_BEYOND = 1.0


def number_text(value: float, form: str = ".1e") -> str:
    """The number, or a dash where it is unknown."""
    return "–" if math.isnan(value) else format(value, form)


def share_text(output: OutputProof) -> str:
    """How much of the allowed error was seen: `12 %`, or `3700 times` what is allowed."""
    share = output.share
    if math.isnan(share):
        return "–"
    return f"{share:.0%}".replace("%", " %") if share <= _BEYOND else f"{share:.2g} times".replace("e+0", "e")


def verdict_text(output: OutputProof) -> str:
    return f"FAIL at {output.failed} of {output.points}" if output.failed else "pass"


def headline(report: Report) -> str:
    """One sentence that says whether the bundle holds."""
    proof = report.proof
    if not proof.passed:
        return "Something in this bundle differs from the model that it was exported from. Do not use it."
    points = {(output.part, output.variant): output.points for output in proof.outputs}
    shares = [output.share for output in proof.outputs if not math.isnan(output.share)]
    most = f"; the largest error takes {max(shares):.0%} of what is allowed".replace("%", " %") if shares else ""
    return (
        f"{len(points)} graphs compute what the original computes, at {sum(points.values())} recorded inputs{most}. "
        f"All {len(proof.stages)} stages of the contract hold, from images and texts to vectors."
    )


def failed_outputs(report: Report) -> list[str]:
    """A sentence for each output that failed."""
    found = []
    for output in report.proof.outputs:
        if output.failed:
            beyond = f": its error is {share_text(output)} what is allowed" if output.share > _BEYOND else ""
            name = (
                f"{output.output} of {output.part} {output.variant}"
                if output.output
                else f"{output.part} {output.variant}"
            )
            found.append(f"{name} fails at {output.failed} of {output.points} recorded inputs{beyond}")
    return found
