"""How far a run over many items is: a bar for people, lines of JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from vlm_export.runtime.bulk.embed import Progress

_SECONDS = 1.0


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """A bar on stderr with rate and time left."""
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
