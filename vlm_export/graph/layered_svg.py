"""Boxes in layers, one below the other, joined by curves: an SVG, drawn without any other tool."""

from __future__ import annotations

import html
import re
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Sizes in pixels; a letter of the font is about this wide.
_LETTER, _LINE, _PADDING, _GAP_X, _GAP_Y = 6.6, 15, 8, 26, 46
_ROUNDS = 8
# What XML 1.0 cannot hold, not even as a reference.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FILLS = {"node": "#dce9f7", "input": "#dff2df", "output": "#f7e3d4", "outside": "#eeeeee"}


@dataclass(frozen=True)
class Box:
    """A node, or a tensor that comes from outside or goes there.

    Attributes:
        style: "node", "input", "output" or "outside".
        title: what a reader sees who points at it.
    """

    key: Hashable
    lines: tuple[str, ...]
    style: str
    title: str = ""

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _LETTER + 2 * _PADDING

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + _PADDING


@dataclass(frozen=True)
class Edge:
    """A tensor between two boxes; the label shows when pointed at."""

    source: Hashable
    target: Hashable
    label: str


def layered_svg(boxes: Sequence[Box], edges: Sequence[Edge]) -> str:
    """The picture. Edges lead downwards, but for those of a cycle."""
    return _svg(_positions(boxes, edges), edges)


@dataclass(frozen=True)
class _Placed:
    box: Box
    x: float
    y: float


def _positions(boxes: Sequence[Box], edges: Sequence[Edge]) -> dict[Hashable, _Placed]:
    """Layers by the longest way from the top; inside a layer, near the middle of what a box is connected with."""
    layer = _layers(boxes, edges)
    rows: dict[int, list[Box]] = {}
    for box in boxes:
        rows.setdefault(layer[box.key], []).append(box)
    neighbours: dict[Hashable, list[Hashable]] = {box.key: [] for box in boxes}
    for edge in edges:
        neighbours[edge.source].append(edge.target)
        neighbours[edge.target].append(edge.source)
    middle = {box.key: float(index) for row in rows.values() for index, box in enumerate(row)}
    for _ in range(_ROUNDS):
        for row in rows.values():
            means = {box.key: _mean([middle[key] for key in neighbours[box.key]], middle[box.key]) for box in row}
            row.sort(key=lambda box: means[box.key])
            middle |= _spread(row, means)
    return _place(rows, middle)


def _layers(boxes: Sequence[Box], edges: Sequence[Edge]) -> dict[Hashable, int]:
    layer: dict[Hashable, int] = {box.key: 0 for box in boxes}
    targets: dict[Hashable, list[Hashable]] = {}
    waits: dict[Hashable, int] = {box.key: 0 for box in boxes}
    for edge in edges:
        targets.setdefault(edge.source, []).append(edge.target)
        waits[edge.target] += 1
    ready = deque(key for key, count in waits.items() if not count)
    while ready:
        key = ready.popleft()
        for target in targets.get(key, ()):
            layer[target] = max(layer[target], layer[key] + 1)
            waits[target] -= 1
            if not waits[target]:
                ready.append(target)
    # What has no predecessor stands right above its first reader.
    for key in [key for key in layer if key in targets and layer[key] == 0]:
        layer[key] = max(0, min(layer[target] for target in targets[key]) - 1)
    return layer


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(row: Sequence[Box], wanted: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Middles near the wanted ones, in that order, without overlap; all in pixels."""
    result: dict[Hashable, float] = {}
    edge = float("-inf")
    for box in row:
        left = max(wanted[box.key] - box.width / 2, edge + _GAP_X)
        result[box.key] = left + box.width / 2
        edge = left + box.width
    # Pushed to the right only, a row would drift: it goes back as a whole.
    drift = _mean([result[box.key] - wanted[box.key] for box in row], 0.0)
    return {key: middle - drift for key, middle in result.items()}


def _place(rows: dict[int, list[Box]], middle: dict[Hashable, float]) -> dict[Hashable, _Placed]:
    left = min(middle[box.key] - box.width / 2 for row in rows.values() for box in row)
    placed: dict[Hashable, _Placed] = {}
    top = float(_PADDING)
    for _, row in sorted(rows.items()):
        for box in row:
            placed[box.key] = _Placed(box, middle[box.key] - box.width / 2 - left + _PADDING, top)
        top += max(box.height for box in row) + _GAP_Y
    return placed


def _svg(placed: dict[Hashable, _Placed], edges: Iterable[Edge]) -> str:
    width = max(entry.x + entry.box.width for entry in placed.values()) + _PADDING
    height = max(entry.y + entry.box.height for entry in placed.values()) + _PADDING
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="monospace" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    parts += [_edge_svg(placed[edge.source], placed[edge.target], edge.label) for edge in edges]
    parts += [_box_svg(entry) for entry in placed.values()]
    return "\n".join([*parts, "</svg>\n"])


def _escaped(text: str) -> str:
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text))


def _edge_svg(source: _Placed, target: _Placed, label: str) -> str:
    x1, y1 = source.x + source.box.width / 2, source.y + source.box.height
    x2, y2 = target.x + target.box.width / 2, target.y
    bend = (y2 - y1) / 2
    return (
        f'<path d="M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}" '
        f'fill="none" stroke="#777" marker-end="url(#tip)"><title>{_escaped(label)}</title></path>'
    )


def _box_svg(entry: _Placed) -> str:
    box = entry.box
    lines = "".join(
        f'<text x="{entry.x + _PADDING:.1f}" y="{entry.y + _LINE * (index + 1) - 2:.1f}"'
        f"{' font-weight=' + chr(34) + 'bold' + chr(34) if index == 0 else ''}>{_escaped(line)}</text>"
        for index, line in enumerate(box.lines)
    )
    return (
        f'<g><title>{_escaped(box.title)}</title><rect x="{entry.x:.1f}" y="{entry.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="4" fill="{_FILLS[box.style]}" stroke="#888"/>{lines}</g>'
    )
