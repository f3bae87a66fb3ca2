"""Stages on stderr: one line each, with its time; live counts on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vlm_export.cli.output import size_text
from vlm_export.text_display import shown

if TYPE_CHECKING:
    from vlm_export.exporting.stages import StageRecord


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
