"""The summary for merge requests: verdict, problems and figures in Markdown; foreign text stands in code spans."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_export.lab.report.findings import Report
from vlm_export.lab.report.words import headline, number_text, share_text, verdict_text
from vlm_export.text_display import LONGEST_FIELD, shown

_MOST_STAGES = 5


def markdown_summary(report: Report) -> str:
    """The summary; GitHub's and GitLab's Markdown."""
    proof, source = report.proof, report.bundle.manifest.source
    mark = "✅ PASS" if proof.passed else "❌ FAIL"
    lines = [f"## {mark}: {_code(report.bundle.manifest.name)}", "", headline(report), ""]
    for number, problem in enumerate(proof.problems, 1):
        lines.append(f"{number}. **{_code(problem.what)}**")
        fields = {"where": problem.where, "expected": problem.expected, "got": problem.got, "fix": problem.fix}
        lines += [f"   - {label}: {_code(text)}" for label, text in fields.items() if text]
    lines += [""] if proof.problems else []
    rows = [
        (
            *map(_code, (output.part, output.variant, output.output or "-")),
            *map(number_text, (output.floor, output.gate, output.seen)),
            share_text(output),
            verdict_text(output),
        )
        for output in proof.outputs
    ]
    lines += _table(("part", "variant", "output", "floor", "gate", "seen", "of the gate", "verdict"), rows)
    failed = [stage for stage in proof.stages if not stage.passed]
    held = sum(stage.passed for stage in proof.stages)
    lines += ["", f"Contract: {held} of {len(proof.stages)} stages hold."]
    for stage in failed[:_MOST_STAGES]:
        lines += [f"- {_code(stage.stage)}: {_code(stage.failures[0] if stage.failures else 'failed')}"]
    lines += ["", f"Made from {_code(source.name)}. Compared by {_code(proof.by)}."]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _code(text: str) -> str:
    """A code span, in which nothing has a meaning but the backtick and, within tables, the bar."""
    visible = shown(text, LONGEST_FIELD).replace("`", "'").replace("|", "\\|")
    return f"`{visible}`" if visible.strip() else "-"
