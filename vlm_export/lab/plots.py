"""Plots as SVG: lines over positions, with a logarithmic scale. A page or a browser shows them as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 900, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 130
_COLOURS = ("#c0392b", "#2471a3", "#7f8c8d", "#229954")
_MOST_LABELS = 30


def error_plot(
    title: str, labels: Sequence[str], lines: Mapping[str, Sequence[float]], marked: int | None = None
) -> str:
    """An SVG document with one line for each series over the labels, from left to right.

    Zeros lie at the bottom, and what is infinite or no number at the top.

    Args:
        labels: one for each position.
        lines: name of a series → its values, one for each label, at least 0.
        marked: position that a vertical line points out.
    """
    known = [value for series in lines.values() for value in series if 0 < value < math.inf]
    low = math.floor(math.log10(min(known))) if known else -8
    high = max(math.ceil(math.log10(max(known))) if known else 0, low + 1)
    frame = _Frame(len(labels), low, high)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<text x="{_LEFT}" y="16" font-size="13">{escape(title)}</text>',
        *frame.grid(),
        *frame.labels(labels),
    ]
    if marked is not None:
        x = frame.x(marked)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#c0392b" '
            'stroke-dasharray="4 3"/>'
        )
    for number, (name, series) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{frame.x(i):.1f},{frame.y(value):.1f}" for i, value in enumerate(series))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points}"/>')
        x = _WIDTH - _RIGHT - 150 * (len(lines) - number)
        parts.append(f'<text x="{x}" y="16" fill="{colour}">— {escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Frame:
    """Where values lie on the canvas."""

    def __init__(self, count: int, low: int, high: int) -> None:
        self._count, self._low, self._high = count, low, high

    def x(self, position: int) -> float:
        return _LEFT + (position + 0.5) * (_WIDTH - _LEFT - _RIGHT) / max(self._count, 1)

    def y(self, value: float) -> float:
        if not value > 0:
            exponent = float(self._low) if value == 0 else float(self._high)
        else:
            exponent = min(max(math.log10(value), self._low), self._high) if value < math.inf else float(self._high)
        share = (exponent - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def grid(self) -> list[str]:
        lines = []
        for exponent in range(self._low, self._high + 1):
            y = self.y(10.0**exponent)
            lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e5e7e9"/>')
            lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>')
        return lines

    def labels(self, labels: Sequence[str]) -> list[str]:
        step = max(1, math.ceil(len(labels) / _MOST_LABELS))
        y = _HEIGHT - _BOTTOM + 12
        return [
            f'<text transform="translate({self.x(i):.1f} {y}) rotate(60)" font-size="10">{escape(label)}</text>'
            for i, label in enumerate(labels)
            if i % step == 0
        ]
