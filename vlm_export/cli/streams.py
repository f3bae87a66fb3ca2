"""The standard streams of a command: what goes to stderr never ends the work, what goes to stdout may."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

from vlm_export.text_display import shown_lines


class _ShownStream:
    """A text stream on which no hidden character arrives as itself (see `text_display`), whatever is printed.

    Line ends stay: those of foreign texts are the printer's to show (`output.print_line`). So does a carriage return
    that a text starts with where `redraws` is true, as progress bars write it.
    """

    def __init__(self, stream: TextIO, *, redraws: bool = False) -> None:
        self._stream = stream
        self._redraws = redraws

    def write(self, text: str) -> int:
        start = "\r" if self._redraws and text.startswith("\r") else ""
        self.write_raw(start + shown_lines(text[len(start) :]))
        return len(text)

    def write_raw(self, text: str) -> None:
        """Writes a text of ours as it is."""
        self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Forgiving(_ShownStream):
    """One whose failures to write are dropped: nobody reads progress and messages on a closed pipe.

    Where it is no terminal, of a line that is drawn again and again only the last state is written.
    """

    _drawn = ""

    def write(self, text: str) -> int:
        if self._redraws:
            return super().write(text)
        if text.startswith("\r"):
            self._drawn = text.strip()
            return len(text)
        drawn, self._drawn = self._drawn, ""
        super().write(drawn + text)
        return len(text)

    def write_raw(self, text: str) -> None:
        try:
            self._stream.write(text)
        except OSError:
            discard(self._stream)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Streams that are closed become the null device; what a stream's encoding lacks, or a terminal would obey instead
    of showing it, is written as escapes."""
    given = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as null:
        # None: closed by who started the process (`>&-`); typeshed knows it not.
        out, err = given[0] or null, given[1] or null
        if isinstance(out, TextIOWrapper):
            out.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = _ShownStream(out), _Forgiving(err, redraws=err.isatty())
        try:
            yield
        finally:
            sys.stdout, sys.stderr = given


def discard(stream: TextIO) -> None:
    """Sends a stream's descriptor to the null device, since the interpreter writes what is left in it at its end."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())
