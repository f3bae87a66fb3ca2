"""What the verbs print: results to stdout, as a table or as JSON."""

from __future__ import annotations

import codecs
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from vlm_export.text_display import escaped_json, shown, shown_lines

_NARROWEST = 20
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
    """Left-aligned columns on stdout; each row is one line, or more where the last cell would pass `width`."""
    lines = [[shown(cell, LONGEST_LINE) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    before = sum(widths[:-1]) + 2 * (len(widths) - 1)
    for *cells, last in lines:
        start = "".join(f"{cell:<{size}}  " for cell, size in zip(cells, widths, strict=False))
        parts = [last] if width is None else textwrap.wrap(last, max(width - before, _NARROWEST)) or [""]
        for number, part in enumerate(parts):
            print(f"{start if number == 0 else ' ' * before}{part}".rstrip())


def terminal_width() -> int:
    """Columns of the terminal, 80 where stdout is none."""
    return shutil.get_terminal_size((80, 24)).columns


def print_warnings(warnings: Iterable[object]) -> None:
    """One line each on stderr, also with --quiet and --json."""
    for warning in warnings:
        print(f"warning: {shown(warning, LONGEST_LINE)}", file=sys.stderr)


def size_text(size_bytes: int) -> str:
    """A size for people: 340.1 MiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
