"""nanoVLM's bundle against eager PyTorch: time to the first token, tokens per second, memory of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring import bundle_or_random
from benchmarks.report import MIB, Bars, Report, table
from vlm_export.lab.timing import median_ratio

GOAL_RATIO = 1.3
OURS = "this project"
SIDES = {OURS: "fp32", "PyTorch": "original", "PyTorch without a cache": "original-uncached"}
"""Label → the side of `chat_side`. The last is nanoVLM-222M's own way; later versions keep a cache."""


def measure(name: str, bundle: Path | None, rounds: int, threads: int, prompt_tokens: int, new_tokens: int) -> Report:
    """Each side in a process of its own, rounds interleaved, after one round of each that must give the same ids."""
    with bundle_or_random(name, bundle) as directory, TemporaryDirectory() as folder:
        sides = {
            label: Side(side, name, directory, Path(folder), threads, prompt_tokens) for label, side in SIDES.items()
        }
        try:
            results = run_rounds(sides, rounds, new_tokens)
        finally:
            for side in sides.values():
                side.close()
    return report_from_results(name, results, rounds, threads, prompt_tokens, new_tokens)


class Side:
    """A process that answers each line on its input, a number of tokens, with one JSON line."""

    def __init__(self, side: str, name: str, bundle: Path, folder: Path, threads: int, prompt_tokens: int) -> None:
        code = "import sys; from benchmarks.chat_side import serve; serve(*sys.argv[1:])"
        weights = folder / f"{side}.safetensors"
        arguments = [side, name, str(bundle), str(weights), str(threads), str(prompt_tokens)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, new_tokens: int) -> dict[str, Any]:
        """One generation."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(new_tokens, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a measured process ended with status {self._process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def run_rounds(sides: Mapping[str, Side], rounds: int, new_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """What each side returns in each round, after one round that warms up."""
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in sides}
    for number in range(rounds + 1):
        for label, side in sides.items():
            result = side.run(new_tokens)
            if number:
                results[label].append(result)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return results


def report_from_results(
    name: str,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    rounds: int,
    threads: int,
    prompt_tokens: int,
    new_tokens: int,
) -> Report:
    """The page of what the processes returned, round by round."""
    ids = [result["ids"] for rounds_of_side in results.values() for result in rounds_of_side]
    equal = all(row == ids[0] for row in ids)
    rows = [_row(label, results[label], results[OURS]) for label in results]
    ours, others = next(row for row in rows if row["label"] == OURS), [row for row in rows if row["label"] != OURS]
    slowest_first, slowest_rate = (min(row[key] for row in others) for key in ("first_ratio", "rate_ratio"))
    smaller = ours["peak"] < min(row["peak"] for row in others)
    columns = {
        "": "{label}",
        "first token, ms": "{first:,.0f}",
        "first token, ratio": "{first_ratio:.2f}",
        "tokens/s": "{rate:.1f}",
        "tokens/s, ratio": "{rate_ratio:.2f}",
        "peak memory, MiB": "{peak:,.0f}",
        "of it anonymous, MiB": "{anonymous:,.0f}",
    }
    title = (
        f"{name}, random weights, {threads} threads, one image, {prompt_tokens} tokens of text, {new_tokens} new "
        f"tokens, greedy; {rounds} interleaved rounds, each side in its own process; medians; ratio: median of the "
        "rounds'; memory: VmHWM and RssAnon, mapped files count in the first"
    )
    return Report(
        title=f"nanoVLM: image and {prompt_tokens} tokens of text to words",
        goal=f"first token and tokens per second at least {GOAL_RATIO:g} times better than eager PyTorch in fp32, with "
        "the same ids, and less memory.",
        reached=min(slowest_first, slowest_rate) >= GOAL_RATIO and equal and smaller,
        conclusion=f"first token {slowest_first:.2f} times, tokens {slowest_rate:.2f} times, "
        f"memory {'below' if smaller else 'above'}, ids {'equal' if equal else 'differ'}.",
        tables=(table(title, columns, rows),),
        bars=Bars(
            "Generated tokens per second, without the first", "tokens/s", [(row["label"], row["rate"]) for row in rows]
        ),
        data={
            "model": name,
            "threads": threads,
            "tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "results": results,
        },
    )


def _row(label: str, rounds: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, token, our_first, our_token = (
        [each[key] for each in side] for side in (rounds, ours) for key in ("first_seconds", "token_seconds")
    )
    return {
        "label": label,
        "first": 1e3 * median(first),
        "first_ratio": median_ratio(first, our_first),
        "rate": 1 / median(token),
        "rate_ratio": median_ratio(token, our_token),
        "peak": rounds[-1]["peak_bytes"] / MIB,
        "anonymous": rounds[-1]["anonymous_bytes"] / MIB,
    }
