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
from typing import Any, NamedTuple

from benchmarks.export import export_random
from benchmarks.report import Bars, Report, Table

GOAL_RATIO = 1.3
MIB = 1 << 20
OURS = "this project"
SIDES = {OURS: "bundle", "PyTorch": "original", "PyTorch without a cache": "original-uncached"}
"""Label → the side of `chat_side`. The last is nanoVLM-222M's own way; later versions keep a cache."""


class Prompt(NamedTuple):
    """Tokens of text that go in besides the image's, and tokens that come out."""

    tokens: int = 12
    new_tokens: int = 32


def measure(
    name: str, bundle: Path | None, rounds: int, threads: int, prompt: Prompt, report_name: str = "chat"
) -> Report:
    """Each side in a process of its own, rounds interleaved, after one round of each that must give the same ids."""
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            export_random(name, bundle, "--no-tokenizer")
        sides = {label: Side(side, name, bundle, Path(folder), threads, prompt.tokens) for label, side in SIDES.items()}
        try:
            results = _rounds(sides, rounds, prompt.new_tokens)
        finally:
            for side in sides.values():
                side.close()
    return report_from_results(name, results, rounds, threads, prompt, report_name)


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


def _rounds(sides: Mapping[str, Side], rounds: int, new_tokens: int) -> dict[str, list[dict[str, Any]]]:
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
    prompt: Prompt,
    report_name: str = "chat",
) -> Report:
    """The page of what the processes returned, round by round."""
    ids = [result["ids"] for rounds_of_side in results.values() for result in rounds_of_side]
    equal = all(row == ids[0] for row in ids)
    others = [label for label in results if label != OURS]
    first = {label: _ratio(results, label, "first_seconds") for label in others}
    rate = {label: _ratio(results, label, "token_seconds") for label in others}
    peak = {label: results[label][-1]["peak_bytes"] for label in results}
    slowest_first, slowest_rate = min(first.values()), min(rate.values())
    smaller = peak[OURS] < min(peak[label] for label in others)
    header = ("", "first token, ms", "ratio", "tokens/s", "ratio", "peak memory, MiB", "of it anonymous, MiB")
    rows = [
        (
            label,
            f"{_median(results[label], 'first_seconds') * 1e3:,.0f}",
            f"{first[label]:.2f}" if label in first else "",
            f"{1 / _median(results[label], 'token_seconds'):.1f}",
            f"{rate[label]:.2f}" if label in rate else "",
            f"{peak[label] / MIB:,.0f}",
            f"{results[label][-1]['anonymous_bytes'] / MIB:,.0f}",
        )
        for label in results
    ]
    return Report(
        name=report_name,
        title=f"nanoVLM: image and {prompt.tokens} tokens of text to words",
        goal=f"first token and tokens per second at least {GOAL_RATIO:g} times better than eager PyTorch in fp32, with "
        "the same ids, and less memory.",
        reached=min(slowest_first, slowest_rate) >= GOAL_RATIO and equal and smaller,
        conclusion=f"first token {slowest_first:.2f} times, tokens {slowest_rate:.2f} times, "
        f"memory {'below' if smaller else 'above'}, ids {'equal' if equal else 'differ'}.",
        command=f"python scripts/benchmark.py chat --name {name} --rounds {rounds} --threads {threads} "
        f"--prompt-tokens {prompt.tokens} --new-tokens {prompt.new_tokens} --report {report_name}",
        tables=(
            Table(
                f"{name}, random weights, {threads} threads, one image, {prompt.tokens} tokens of text, "
                f"{prompt.new_tokens} new tokens, greedy; {rounds} "
                "interleaved rounds, each side in its own process; medians; ratio: median of the rounds'; memory: "
                "VmHWM and RssAnon, mapped files count in the first",
                header,
                rows,
            ),
        ),
        bars=Bars(
            "Generated tokens per second, without the first",
            "tokens/s",
            [(label, 1 / _median(results[label], "token_seconds")) for label in results],
        ),
        data={"model": name, "threads": threads, **prompt._asdict(), "results": results},
    )


def _median(rounds: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(median(result[key] for result in rounds))


def _ratio(results: Mapping[str, Sequence[Mapping[str, Any]]], label: str, key: str) -> float:
    pairs = zip(results[label], results[OURS], strict=True)
    return float(median(theirs[key] / ours[key] for theirs, ours in pairs))
