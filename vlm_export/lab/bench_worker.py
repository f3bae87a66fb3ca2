"""One side of a bench, in a process of its own: it opens what it runs once, and then runs it as it is asked to.

The job is the first line of stdin, a JSON document; each line after it is a request, and each gets one answer
(`worker_answers`). It ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from vlm_export.bundle.memory import anonymous_bytes, peak_bytes
from vlm_export.lab.bench_plan import save_arrays
from vlm_export.lab.bench_runs import Runs, opened_side
from vlm_export.lab.worker_answers import open_answers, say, told


def main() -> int:
    """Serves until the input ends; the status is 0 where every request got its answer."""
    answers = open_answers()
    job = json.loads(sys.stdin.readline())
    try:
        start = time.perf_counter()
        with opened_side(job) as side:
            say(answers, result={"seconds": time.perf_counter() - start})
            for line in sys.stdin:
                say(answers, result=_answer(side, json.loads(line)))
    except Exception as error:
        known = told(error)
        if known is None:
            raise
        say(answers, error=known.to_json())
    return 0


def _answer(side: Runs, request: Mapping[str, Any]) -> dict[str, Any]:
    if "time" in request:
        for _ in range(request["warm"]):
            side.seconds(request["time"])
        return {"seconds": sum(side.seconds(request["time"]) for _ in range(request["calls"])) / request["calls"]}
    if "outputs" in request:
        for number, about in enumerate(request["outputs"]):
            save_arrays(f"{request['to']}-{number}.npz", side.outputs(about))
        return {}
    return {"peak_bytes": peak_bytes(), "anonymous_bytes": anonymous_bytes()}


if __name__ == "__main__":
    sys.exit(main())
