"""What the verbs print: results to stdout, as a table or as JSON."""

from __future__ import annotations

import codecs
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from vlm_export.text_display import escaped_json, shown, shown_lines, size_text

if TYPE_CHECKING:
    from vlm_export.exporting.stages import StageRecord


_NARROWEST, _GAP = 20, "  "
LONGEST_LINE = 100_000
"""Characters of a line or cell that are printed; a caption or a label is never cut, a file without end is."""


def print_json(data: Any) -> None:
    """One JSON document on stdout. A closed pipe is left to `main`, since it must not change the exit status.

    Hidden characters are JSON's escapes; where stdout cannot hold every letter, so are those beyond ASCII.
    """
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    document = json.dumps(data, indent=1, ensure_ascii=escaped, allow_nan=False)
    with suppress(BrokenPipeError):
        sys.stdout.write(escaped_json(document) + "\n")


def print_line(*texts: object) -> None:
    """One line on stdout, also where a text holds line ends: those are shown as escapes."""
    print(*(shown(text, LONGEST_LINE) for text in texts))


def print_text(text: str) -> None:
    """A text that a model wrote, on stdout: its line ends stay, since nothing of ours is printed beside it."""
    print(shown_lines(text))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> None:
    """Left-aligned columns on stdout; each row is one line, or with `width` as many as keep every cell in its column.

    Nothing is cut: cells that are too wide go on below, broken between words where there are any.
    """
    lines = [[shown(cell, LONGEST_LINE) for cell in row] for row in (header, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if width is not None:
        widths = _fitted(columns, width - len(_GAP) * (len(columns) - 1))
    for line in lines:
        cells = [_wrapped(cell, size) for cell, size in zip(line, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            print(_GAP.join(f"{part:<{size}}" for part, size in zip(parts, widths, strict=True)).rstrip())


def _fitted(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths that fill at most `room`: of a column's longest word, where the others still have theirs or the narrowest,
    and the rest shared by need."""
    wanted = [max(map(len, column)) for column in columns]
    words = [max(len(_indent(cell)) + max(map(len, cell.split()), default=0) for cell in column) for column in columns]
    widths, by_word = [0] * len(columns), sorted(range(len(columns)), key=words.__getitem__)
    for position, i in enumerate(by_word):
        if words[i] <= room - sum(min(words[j], _NARROWEST) for j in by_word[position + 1 :]):
            widths[i], room = words[i], room - words[i]
    order = sorted(range(len(columns)), key=lambda i: wanted[i] - widths[i])
    for position, i in enumerate(order):
        more = min(wanted[i] - widths[i], max(room // (len(order) - position), _NARROWEST - widths[i], 0))
        widths[i] += more
        room -= more
    return widths


def _wrapped(cell: str, size: int) -> list[str]:
    if len(cell) <= size:
        return [cell]
    indent = _indent(cell)
    return textwrap.wrap(cell.strip(), size, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _indent(cell: str) -> str:
    return cell[: len(cell) - len(cell.lstrip())]


def terminal_width() -> int:
    """Columns of the terminal, 80 where stdout is none."""
    return shutil.get_terminal_size((80, 24)).columns


def print_warnings(warnings: Iterable[object]) -> None:
    """One line each on stderr, also with --quiet and --json."""
    for warning in warnings:
        print(f"warning: {shown(warning, LONGEST_LINE)}", file=sys.stderr)


class StagePrinter:
    """Implements `StageListener`."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def started(self, name: str) -> None:
        self._redraw(f"{name} …")

    def progressed(self, name: str, done: int, total: int) -> None:
        if total > 0:
            self._redraw(f"{name} … {100 * done // total} %")

    def finished(self, record: StageRecord) -> None:
        self._redraw("")
        memory = record.peak_anonymous_bytes
        peak = "" if memory is None else f"  peak {size_text(memory)}"
        print(f"{shown(record.name):<32}{record.seconds:8.2f} s{peak}", file=sys.stderr)

    def _redraw(self, text: str) -> None:
        if self._live:
            # The erasing sequence is ours, which a stream that shows foreign text would show.
            write = getattr(sys.stderr, "write_raw", sys.stderr.write)
            write(f"\r\x1b[K{shown(text)}")
            sys.stderr.flush()
