"""Plots as SVG: errors on a logarithmic scale, and bars. A page or a browser shows them as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vlm_export.text_display import shown

_WIDTH, _HEIGHT = 900, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 130
_RED, _BLUE, _GREY, _GREEN = _COLOURS = ("#c0392b", "#2471a3", "#7f8c8d", "#229954")
_MOST_LABELS = 30
_BAR_HEIGHT, _BAR_LEFT, _BAR_RIGHT, _BAR_WIDTH = 20, 180, 70, 480
_MARK_WIDTH, _MARK_ROOM = 720, 170
_LABEL_HEIGHT, _LETTER_WIDTH = 12, 6.2
_NARROW, _MOST_LEVEL_LABELS, _LEGEND_HEIGHT = 480, 3, 20
MOST_NARROW_POINTS = 24
"""A plot of more points is as wide as a page, others half as wide."""


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
    frame = _Frame(len(labels), (value for series in lines.values() for value in series))
    parts = [*_head(title, _WIDTH, _HEIGHT, _LEFT), *frame.grid(), *frame.labels(labels)]
    if marked is not None:
        x = frame.x(marked)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="{_RED}" '
            'stroke-dasharray="4 3"/>'
        )
    for number, (name, series) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{frame.x(i):.1f},{frame.y(value):.1f}" for i, value in enumerate(series))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points}"/>')
        x = _WIDTH - _RIGHT - 150 * (len(lines) - number)
        parts.append(f'<text x="{x}" y="16" fill="{colour}">— {_text(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class PlottedPoint:
    """What a point is called, its error (at least 0, or no number), and whether it failed."""

    label: str
    error: float
    failed: bool


@dataclass(frozen=True)
class PointGroup:
    """The errors of one output at several points; floor and gate are NaN where they are unknown."""

    name: str
    points: Sequence[PlottedPoint]
    floor: float
    gate: float


def point_plot(title: str, groups: Sequence[PointGroup]) -> str:
    """An SVG document with one dot for each point, red where it failed; floor and gate of its group are drawn in.

    What is no number lies at the top. Dots say which point they are when one points at them.
    """
    count = sum(len(group.points) for group in groups)
    limits = [limit for group in groups for limit in (group.floor, group.gate)]
    width = _NARROW if count <= MOST_NARROW_POINTS else _WIDTH
    frame = _Frame(count, [*limits, *(point.error for group in groups for point in group.points)], width)
    level = len(groups) <= _MOST_LEVEL_LABELS
    height = _HEIGHT - _BOTTOM + _LEGEND_HEIGHT + (_LEGEND_HEIGHT if level else _BOTTOM)
    parts = [*_head(title, width, height, _LEFT), *frame.grid(), *_legend(height - 6)]
    position, labels = 0, [""] * count
    for group in groups:
        if not group.points:
            continue
        left, right = frame.x(position) - frame.step / 2, frame.x(position + len(group.points) - 1) + frame.step / 2
        parts += _limits(frame, group, left, right)
        labels[position + (len(group.points) - 1) // 2] = group.name
        for point in group.points:
            colour, radius = (_RED, 5) if point.failed else (_GREEN, 3.5)
            text = _text(f"{group.name}, {point.label}: {point.error:.2g} (gate {group.gate:.2g})")
            parts.append(
                f'<circle cx="{frame.x(position):.1f}" cy="{frame.y(point.error):.1f}" r="{radius}" fill="{colour}">'
                f"<title>{text}</title></circle>"
            )
            position += 1
    return "\n".join([*parts, *(frame.level_labels(labels) if level else frame.labels(labels)), "</svg>", ""])


def bar_plot(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """An SVG document with one horizontal bar for each label, value (at least 0) and text of the value."""
    most = max((value for _, value, _ in bars), default=0) or 1
    height = _TOP + _BAR_HEIGHT * len(bars) + 6
    parts = _head(title, _BAR_WIDTH, height, 6)
    for number, (label, value, text) in enumerate(bars):
        y = _TOP + _BAR_HEIGHT * number
        width = (_BAR_WIDTH - _BAR_LEFT - _BAR_RIGHT) * value / most
        parts += [
            f'<text x="{_BAR_LEFT - 6}" y="{y + 13}" text-anchor="end">{_text(label)}</text>',
            f'<rect x="{_BAR_LEFT}" y="{y + 3}" width="{max(width, 1):.1f}" height="14" fill="{_BLUE}"/>',
            f'<text x="{_BAR_LEFT + width + 6:.1f}" y="{y + 13}">{_text(text)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _head(title: str, width: int, height: int, left: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{_text(title)}</title>",
        f'<text x="{left}" y="16" font-size="13">{_text(title)}</text>',
    ]


def _legend(y: int) -> list[str]:
    words = ((_GREEN, "● passed"), (_RED, "● failed"), (_RED, "— gate"), (_GREY, "┄ floor (noise)"))
    return [
        f'<text x="{_LEFT + 85 * i}" y="{y}" fill="{colour}">{word}</text>' for i, (colour, word) in enumerate(words)
    ]


def _limits(frame: _Frame, group: PointGroup, left: float, right: float) -> list[str]:
    drawn = ((group.gate, f'stroke="{_RED}"'), (group.floor, f'stroke="{_GREY}" stroke-dasharray="4 3"'))
    return [
        f'<line x1="{left:.1f}" y1="{frame.y(value):.1f}" x2="{right:.1f}" y2="{frame.y(value):.1f}" '
        f'stroke-width="1.6" {style}/>'
        for value, style in drawn
        if not math.isnan(value)
    ]


class _Frame:
    """Where values lie on the canvas: `count` positions, and a scale that holds the values."""

    def __init__(self, count: int, values: Iterable[float], width: int = _WIDTH) -> None:
        known = [value for value in values if 0 < value < math.inf]
        self._right = width - _RIGHT
        self._low = math.floor(math.log10(min(known))) if known else -8
        self._high = max(math.ceil(math.log10(max(known))) if known else 0, self._low + 1)
        self.step = (self._right - _LEFT) / max(count, 1)

    def x(self, position: int) -> float:
        return _LEFT + (position + 0.5) * self.step

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
            lines.append(_grid_line(y, f"1e{exponent}", self._right))
        return lines

    def level_labels(self, labels: Sequence[str]) -> list[str]:
        y = _HEIGHT - _BOTTOM + 14
        return [
            f'<text x="{self.x(i):.1f}" y="{y}" text-anchor="middle">{_text(label)}</text>'
            for i, label in enumerate(labels)
            if label
        ]

    def labels(self, labels: Sequence[str]) -> list[str]:
        """Those that are not empty, as many as have room."""
        given = [i for i, label in enumerate(labels) if label]
        step = max(1, math.ceil(len(given) / _MOST_LABELS))
        y = _HEIGHT - _BOTTOM + 12
        return [
            f'<text transform="translate({self.x(i):.1f} {y}) rotate(60)" font-size="10">{_text(labels[i])}</text>'
            for i in given[::step]
        ]


@dataclass(frozen=True)
class Mark:
    """A point with a name, at its place along both scales (at least 0)."""

    label: str
    x: float
    y: float


def mark_plot(title: str, marks: Sequence[Mark], *, joined: bool = False) -> str:
    """An SVG document with a named point for each mark, from 0 on from left to right.

    Args:
        joined: points of one name are a line, over a height that begins with 0; otherwise the height is logarithmic,
            and zeros lie at the bottom.
    """
    frame = _Frame(1, (mark.y for mark in marks), _MARK_WIDTH)
    right, low = _MARK_WIDTH - _MARK_ROOM, _HEIGHT - _BOTTOM
    step = _round_step(max((mark.x for mark in marks), default=0) or 1)
    most_x = step * math.ceil((max((mark.x for mark in marks), default=0) or 1) / step)
    most_y = max((mark.y for mark in marks), default=0) or 1

    def place(mark: Mark) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * mark.x / most_x
        return x, low - (low - _TOP) * mark.y / most_y if joined else frame.y(mark.y)

    height = low + _LEGEND_HEIGHT
    grid = [_grid_line(low, "0", right), _grid_line(_TOP, f"{most_y:.3g}", right)] if joined else frame.grid()
    parts = [*_head(title, _MARK_WIDTH, height, _LEFT), *grid]
    for number in range(round(most_x / step) + 1):
        x = _LEFT + (right - _LEFT) * number * step / most_x
        parts.append(f'<text x="{x:.1f}" y="{low + 14}" text-anchor="middle">{number * step:.3g}</text>')
    names = list(dict.fromkeys(mark.label for mark in marks))
    for mark in marks:
        (x, y), colour = place(mark), _COLOURS[names.index(mark.label) % len(_COLOURS)]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
            f"<title>{_text(f'{mark.label}: {mark.x:.3g}, {mark.y:.3g}')}</title></circle>"
        )
    ends = {name: place([mark for mark in marks if mark.label == name][-1]) for name in names}
    heights = _label_heights(ends)
    for name in names:
        own, colour = [mark for mark in marks if mark.label == name], _COLOURS[names.index(name) % len(_COLOURS)]
        points = [place(mark) for mark in own]
        if joined and len(own) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{line}"/>')
        (x, y), at = ends[name], heights[name]
        if abs(at - y) > _LABEL_HEIGHT / 2:
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x + 8:.1f}" y2="{at:.1f}" stroke="{colour}"/>')
        parts.append(f'<text x="{x + 9:.1f}" y="{at + 4:.1f}" fill="{colour}">{_text(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _round_step(most: float) -> float:
    """1, 2 or 5 times a power of ten, so that four to eight of them hold the most."""
    magnitude = 10.0 ** math.floor(math.log10(most / 4))
    return next(magnitude * factor for factor in (1, 2, 5, 10) if most <= 8 * magnitude * factor)


def _label_heights(ends: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Where the names of points stand: beside them, or as near as there is room between the other names."""
    placed: dict[str, float] = {}
    for name, (x, y) in sorted(ends.items(), key=lambda entry: entry[1][1]):
        taken = [
            placed[other]
            for other in placed
            if ends[other][0] < x + _LETTER_WIDTH * len(name) and x < ends[other][0] + _LETTER_WIDTH * len(other)
        ]
        ways = sorted((sign * _LABEL_HEIGHT * i / 2 for i in range(2 * len(ends) + 1) for sign in (1, -1)), key=abs)
        free = [y + way for way in ways if all(abs(y + way - other) >= _LABEL_HEIGHT for other in taken)]
        placed[name] = next((at for at in free if _TOP <= at <= _HEIGHT - _BOTTOM), y)
    return placed


def stacked(plots: Sequence[str]) -> str:
    """One SVG document with all of them, one below the other."""
    sizes = [_size_of(plot) for plot in plots]
    height, parts = 0, []
    for plot, (width, own) in zip(plots, sizes, strict=True):
        parts.append(plot.replace("<svg ", f'<svg y="{height}" width="{width}" height="{own}" ', 1).rstrip())
        height += own
    width = max((width for width, _ in sizes), default=1)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {max(height, 1)}">'
    return "\n".join([head, *parts, "</svg>", ""])


def _size_of(plot: str) -> tuple[int, int]:
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', plot)
    assert found is not None, "a plot of `_head`"
    return int(found[1]), int(found[2])


def _grid_line(y: float, text: str, right: float) -> str:
    return (
        f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e7e9"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _text(text: str) -> str:
    """Foreign text: hidden characters, which XML does not take, as escapes."""
    return escape(shown(text))
