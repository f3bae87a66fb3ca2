"""What the verbs print: results to stdout, as a table or as JSON."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any


def print_json(data: Any) -> None:
    """One JSON document on stdout. A closed pipe is left to `main`, since it must not change the exit status.

    Where stdout cannot hold every letter, those beyond ASCII are JSON's escapes.
    """
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    with suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=escaped, allow_nan=False) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns on stdout."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_warnings(warnings: Iterable[object]) -> None:
    """One line each on stderr, also with --quiet and --json."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def size_text(size_bytes: int) -> str:
    """A size for people: 340.1 MiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
