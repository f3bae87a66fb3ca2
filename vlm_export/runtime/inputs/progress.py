"""A bar of progress on stderr, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """Told of what has been done."""

    def update(self, n: int = 1, /) -> object: ...


class _NoBar:
    def update(self, n: int = 1, /) -> None:
        pass


@contextmanager
def progress_bar(total: int, unit: str, *, shown: bool) -> Iterator[Bar]:
    """A bar with rate and time left; its library, which takes a tenth of what a first embedding imports, is imported
    where it is shown."""
    if not shown:
        yield _NoBar()
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit) as bar:
        yield bar
