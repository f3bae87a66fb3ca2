"""What a benchmark writes: data as JSON, a page as Markdown, and bars as SVG."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"
MIB = 1 << 20
_TOOLS = ("vlm-export", "torch", "onnx", "onnxruntime", "numpy")
_BAR_PIXELS, _ROW_PIXELS, _LABEL_PIXELS = 420, 26, 230


@dataclass(frozen=True)
class Table:
    """A table of the page; the first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def table(title: str, columns: Mapping[str, str], results: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each result; columns: header → the format of the cell, with the result's keys as fields."""
    return Table(title, tuple(columns), [tuple(form.format_map(each) for form in columns.values()) for each in results])


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: label → value."""

    title: str
    unit: str
    values: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Report:
    """A benchmark's result.

    Attributes:
        goal: what the project promises, one sentence.
        reached: whether the result keeps it.
        conclusion: the result in one sentence.
        data: all measurements.
    """

    title: str
    goal: str
    reached: bool
    conclusion: str
    tables: tuple[Table, ...]
    bars: Bars
    data: dict[str, Any] = field(default_factory=dict)


def write_report(report: Report, folder: Path, name: str, command: str) -> str:
    """Writes NAME.json, NAME.md and NAME.svg; returns the page. command: how to measure again."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine(), "goal": report.goal, "reached": report.reached, **report.data}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.svg").write_text(_svg(report.bars), encoding="utf-8")
    page = _page(report, name, command)
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    return page


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _page(report: Report, name: str, command: str) -> str:
    facts = machine()
    tools = ", ".join(f"{tool} {number}" for tool, number in facts["versions"].items())
    lines = [
        f"# {report.title}",
        "",
        f"Goal: {report.goal}",
        f"Result: {report.conclusion} The goal is {'reached' if report.reached else 'missed'}.",
        "",
        f"![{report.bars.title}]({name}.svg)",
        "",
    ]
    for each in report.tables:
        rule = ["---", *["---:"] * (len(each.header) - 1)]
        rows = ["| " + " | ".join(cells) + " |" for cells in (each.header, rule, *each.rows)]
        lines += [f"**{each.title}**", "", *rows, ""]
    lines += [f"Measured on {facts['processor']}, {facts['cores']} cores, {facts['system']}, with {tools}.", ""]
    lines += [f"Measure again: `{command}`. All figures: [{name}.json]({name}.json)."]
    return "\n".join(lines) + "\n"


def _svg(bars: Bars) -> str:
    top = max((value for _, value in bars.values), default=0.0) or 1.0
    width, height = _LABEL_PIXELS + _BAR_PIXELS + 110, _ROW_PIXELS * (len(bars.values) + 1) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-weight="bold" fill="#222222">{escape(bars.title)}</text>',
    ]
    for i, (label, value) in enumerate(bars.values, start=1):
        y, length = _ROW_PIXELS * i + 8, _BAR_PIXELS * value / top
        parts += [
            f'<text x="{_LABEL_PIXELS - 8}" y="{y + 14}" text-anchor="end" fill="#222222">{escape(label)}</text>',
            f'<rect x="{_LABEL_PIXELS}" y="{y}" width="{length:.1f}" height="18" fill="#3b6ea5"/>',
            f'<text x="{_LABEL_PIXELS + length + 6:.1f}" y="{y + 14}" fill="#222222">{value:,.4g} {bars.unit}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
