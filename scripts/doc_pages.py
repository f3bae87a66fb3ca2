"""The pages that a person reads, and the blocks in them that scripts write.

A written block stands between `<!-- session -->` or `<!-- table: NAME -->` and the closing comment of the same kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def all_pages() -> tuple[Path, ...]:
    """README first, then the pages of docs/ by name; docs/benchmarks is written by `scripts/benchmark.py`."""
    return (README, *sorted((ROOT / "docs").glob("*.md")))


def read_pages() -> dict[Path, str]:
    """The text of every page."""
    return {page: page.read_text(encoding="utf-8") for page in all_pages()}


def write_or_check(
    new: Mapping[Path, str], *, check: bool, script: str, comparable: Callable[[str], object] = str
) -> int:
    """Writes the pages, or says which of them differ from what was read.

    Args:
        check: compare, and write nothing.
        script: the name of the script that writes them, for the message.
        comparable: what of a page must be equal.

    Returns:
        The exit status: 1 when the check finds a difference.
    """
    if not check:
        for page, text in new.items():
            page.write_text(text, encoding="utf-8")
        return 0
    stale = [page for page, text in new.items() if comparable(page.read_text(encoding="utf-8")) != comparable(text)]
    for page in stale:
        print(f"{page.relative_to(ROOT)} is not up to date: python scripts/{script}", file=sys.stderr)
    return int(bool(stale))
