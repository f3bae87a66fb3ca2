"""How far a run over many items is: a bar on stderr for people, lines of JSON for machines, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Progress = Callable[[int, int], None]
"""Called with the number of items done and of all of them."""

_SECONDS = 1.0


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


@contextmanager
def growing_bar(unit: str) -> Iterator[Progress]:
    """A bar whose total is told with each step."""
    from tqdm import tqdm

    with tqdm(unit=unit) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield told


@contextmanager
def progress_lines() -> Iterator[Progress]:
    """A line of JSON on stderr each second and at the end: items done, of how many, per second, and seconds left."""
    start = last = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS and done < total:
            return
        last, rate = now, done / max(now - start, 1e-9)
        line = {"done": done, "total": total, "rate": round(rate, 2), "seconds_left": round((total - done) / rate, 1)}
        print(json.dumps(line), file=sys.stderr, flush=True)

    yield told
