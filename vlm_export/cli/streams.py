"""The standard streams of a command: what goes to stderr never ends the work, what goes to stdout may."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO


class _Forgiving:
    """A text stream whose failures to write are dropped: nobody reads progress and messages on a closed pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Streams that are closed become the null device; texts that a stream's encoding lacks are written as escapes."""
    given = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as null:
        # None: closed by who started the process (`>&-`); typeshed knows it not.
        sys.stdout = given[0] or null
        sys.stderr = _Forgiving(given[1] or null)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = given


def discard(stream: TextIO) -> None:
    """Sends a stream's descriptor to the null device, since the interpreter writes what is left in it at its end."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())
