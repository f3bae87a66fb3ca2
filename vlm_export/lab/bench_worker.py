"""One side of a bench, in a process of its own: it opens a part once, and then runs it as it is asked to.

The job is the first line of stdin, a JSON document; each line after it is a request, and each gets one answer
(`worker_answers`). It ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm_export.api import source_run
from vlm_export.bundle.opened import open_bundle
from vlm_export.lab.bench_plan import TORCH, save_arrays
from vlm_export.lab.worker_answers import open_answers, say, told
from vlm_export.proof.memory import anonymous_bytes, peak_bytes
from vlm_export.proof.points import Arrays
from vlm_export.runtime.engines.choice import engine_choice
from vlm_export.runtime.engines.onnxruntime import run_in_float32
from vlm_export.runtime.session import Session

Run = Callable[[Arrays], Arrays]


def main() -> int:
    """Serves until the input ends; the status is 0 where every request got its answer."""
    answers = open_answers()
    job = json.loads(sys.stdin.readline())
    try:
        start = time.perf_counter()
        with _opened(job) as side:
            say(answers, result={"seconds": time.perf_counter() - start})
            for line in sys.stdin:
                say(answers, result=side.answer(json.loads(line)))
    except Exception as error:
        known = told(error)
        if known is None:
            raise
        say(answers, error=known.to_json())
    return 0


class _Side:
    """What runs, and the inputs that it has read."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._inputs = cache(_read_arrays)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if "time" in request:
            return {"seconds": self._seconds(self._inputs(request["time"]), request["calls"], request["warm"])}
        if "outputs" in request:
            for number, path in enumerate(request["outputs"]):
                save_arrays(f"{request['to']}-{number}.npz", self._run(self._inputs(path)))
            return {}
        return {"peak_bytes": peak_bytes(), "anonymous_bytes": anonymous_bytes()}

    def _seconds(self, inputs: Arrays, calls: int, warm: int) -> float:
        for _ in range(warm):
            self._run(inputs)
        start = time.perf_counter()
        for _ in range(calls):
            self._run(inputs)
        return (time.perf_counter() - start) / calls


@contextmanager
def _opened(job: Mapping[str, Any]) -> Iterator[_Side]:
    bundle, part = open_bundle(job["bundle"]), job["part"]
    if job["engine"] == TORCH:
        with source_run(bundle, job["source"], part, job["precision"], job["threads"]) as run:
            yield _Side(run)
        return
    if job["graph"] is not None:
        engine = engine_choice(job["engine"], None, job["threads"], in_bf16=job["in_bf16"])
        yield _Side(partial(run_in_float32, engine.open(Path(job["graph"]))))
        return
    session = Session(bundle, precision=job["precision"], engine=job["engine"], threads=job["threads"])
    session.engine(part)
    yield _Side(partial(session.run, part))


def _read_arrays(path: str) -> Arrays:
    with np.load(Path(path)) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    sys.exit(main())
