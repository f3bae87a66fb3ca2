"""Counts the package's files that a command crosses: `python scripts/trace_files.py -- embed DIR IMAGE -o FILE`.

A file counts when a function of it is called; importing it is not enough.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from vlm_export.cli.main import main as run_command

PACKAGE = Path(__file__).resolve().parent.parent / "vlm_export"


class CalledFiles:
    """A profiling hook that remembers in which of the package's files a function was called."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._known: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # A class statement runs its body once, at the import: its code lacks the flag of functions.
        if event != "call" or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if code.co_filename not in self._known:
            path = Path(code.co_filename)
            self._known[code.co_filename] = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None
        name = self._known[code.co_filename]
        if name is not None and name not in self.names and not _is_importing(frame):
            self.names.add(name)


def _is_importing(frame: FrameType) -> bool:
    """Whether a file of the package is being imported, which calls functions where no earlier command imported it."""
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_name == "<module>" and Path(above.f_code.co_filename).is_relative_to(PACKAGE):
            return True
        above = above.f_back
    return False


def called_files(arguments: list[str]) -> set[str]:
    """The files of the package, relative to it, in which the command calls a function; in all of its threads."""
    called = CalledFiles()
    threading.setprofile(called)
    sys.setprofile(called)
    try:
        run_command(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return called.names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the files' names too")
    parser.add_argument("command", nargs="+", help="a command of vlm-export with its arguments, after --")
    args = parser.parse_args()
    names = called_files(args.command)
    if args.list:
        print("\n".join(sorted(names)))
    print(f"{len(names)} files: vlm-export {' '.join(args.command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
