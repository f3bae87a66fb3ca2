"""A decoder's variants against its own float32, and where float32's time goes: first token, and each one after it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import vlm_export
from benchmarks.chat import Side, run_rounds
from benchmarks.chat_side import generation, inputs
from benchmarks.measuring import ANY_LOSS, bundle_or_random
from benchmarks.report import MIB, Bars, Report, table
from vlm_export.bundle.opened import open_bundle
from vlm_export.lab.timing import median_ratio
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.model import Model
from vlm_export.runtime.session import Session

GOAL_RATIO = 2.0
FLOAT32 = "fp32"
Event = Mapping[str, Any]
WEIGHTS, ATTENTION, SOFTMAX, CACHES, REST = (
    "products with weights",
    "products of attention",
    "softmax",
    "joined caches and halves",
    "the rest",
)
_KINDS = {
    **dict.fromkeys(("Gemm", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"), WEIGHTS),
    "FusedMatMul": ATTENTION,
    "Softmax": SOFTMAX,
    "Concat": CACHES,
}


def measure(
    name: str,
    bundle: Path | None,
    rounds: int,
    threads: int,
    prompt_tokens: int,
    new_tokens: int,
    precision: Sequence[str],
) -> Report:
    """Each precision in a process of its own, rounds interleaved; then float32's profile, by ONNX Runtime."""
    with bundle_or_random(name, bundle) as directory, TemporaryDirectory() as folder:
        for each in precision:
            parts = open_bundle(directory).manifest.parts
            if not any(variant.precision == each for part in parts for variant in part.variants):
                print(f"quantising {name} to {each}", file=sys.stderr)
                vlm_export.quantize(directory, each, budget=ANY_LOSS)
        sides = {
            each: Side(each, name, directory, Path(folder), threads, prompt_tokens) for each in (FLOAT32, *precision)
        }
        try:
            results = run_rounds(sides, rounds, new_tokens)
        finally:
            for side in sides.values():
                side.close()
        shares = profiled(directory, Path(folder), threads, prompt_tokens, new_tokens)
    return report_from_results(name, results, shares, rounds, threads, prompt_tokens, new_tokens)


def profiled(
    bundle: Path, folder: Path, threads: int, prompt_tokens: int, new_tokens: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of float32's decoder by kind of work: up to the first token, and of the tokens that follow it."""
    session = _Profiling(bundle, folder, threads)
    generate, form = generation(Model(session))
    pixels, text = inputs(*form, prompt_tokens)
    for _ in range(2):
        list(islice(generate(pixels, text), new_tokens))
    session.decoder.profiled_nodes()
    (path,) = folder.glob("profile*.json")
    return shares_of_work(json.loads(path.read_text(encoding="utf-8")), new_tokens - 1)


class _Profiling(Session):
    """A float32 bundle whose decoder, the part with a cache, writes ONNX Runtime's profile."""

    def __init__(self, bundle: Path, folder: Path, threads: int) -> None:
        super().__init__(open_bundle(bundle), precision=FLOAT32, threads=threads)
        (part,) = (part for part in self.manifest.parts if any(axis.sum_of for axis in part.signature.axes))
        graph = self.bundle.model_files(part.variant(FLOAT32))
        self.decoder = OrtEngine(graph, threads=threads, profile=str(folder / "profile"))
        self._engines[part.name] = self.decoder


def shares_of_work(events: Sequence[Event], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the time in nodes, of two generations of which the first one warmed up.

    Args:
        events: of ONNX Runtime's profile.
        steps: runs after those of the prompt, in each of both.

    Returns:
        Kind of work → share, of the prompt's runs and of the steps'.
    """
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    runs = runs[len(runs) // 2 :]
    found = []
    for chosen in (runs[: len(runs) - steps], runs[len(runs) - steps :]):
        start, end = chosen[0]["ts"], chosen[-1]["ts"] + chosen[-1]["dur"]
        times: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and start <= event["ts"] < end:
                times[_kind(event["args"])] += event["dur"]
        total = sum(times.values())
        found.append({kind: times[kind] / total for kind in (WEIGHTS, ATTENTION, SOFTMAX, CACHES, REST)})
    return found[0], found[1]


def _kind(node: Mapping[str, Any]) -> str:
    if node["op_name"] != "MatMul":
        return _KINDS.get(node["op_name"], REST)
    shapes = [shape for entry in node["input_type_shape"] for shape in entry.values()]
    # Of weights that were packed beforehand the profile says nothing.
    return WEIGHTS if len(shapes) < 2 or len(shapes[1]) == 2 else ATTENTION


def report_from_results(
    name: str,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    shares: tuple[Mapping[str, float], Mapping[str, float]],
    rounds: int,
    threads: int,
    prompt_tokens: int,
    new_tokens: int,
) -> Report:
    """The page of what the processes returned, round by round, and of the profile."""
    rows = [_row(label, results[label], results[FLOAT32]) for label in results]
    variants = [row for row in rows if row["label"] != FLOAT32]
    best = max(variants, key=lambda row: min(row["first_ratio"], row["rate_ratio"]))
    columns = {
        "": "{label}",
        "first token, ms": "{first:,.0f}",
        "first token, ratio": "{first_ratio:.2f}",
        "tokens/s": "{rate:.1f}",
        "tokens/s, ratio": "{rate_ratio:.2f}",
        "peak memory, MiB": "{peak:,.0f}",
    }
    title = (
        f"{name}, random weights, {threads} threads, one image, {prompt_tokens} tokens of text, {new_tokens} new "
        f"tokens, greedy; {rounds} interleaved rounds, each side in its own process; medians; ratio to float32: median "
        "of the rounds'"
    )
    kinds = [{"label": kind, "first": shares[0][kind], "next": shares[1][kind]} for kind in shares[0]]
    return Report(
        title=f"{name}: variants of the decoder, after {prompt_tokens} tokens of text",
        goal=f"a variant with first token and tokens per second at least {GOAL_RATIO:g} times better than float32's.",
        reached=min(best["first_ratio"], best["rate_ratio"]) >= GOAL_RATIO,
        conclusion=f"{best['label']}: first token {best['first_ratio']:.2f} times, tokens {best['rate_ratio']:.2f} "
        "times.",
        tables=(
            table(title, columns, rows),
            table(
                "Where float32's decoder spends its time, by ONNX Runtime's profile",
                {"": "{label}", "first token": "{first:.0%}", "next tokens": "{next:.0%}"},
                kinds,
            ),
        ),
        bars=Bars(
            "Generated tokens per second, without the first", "tokens/s", [(row["label"], row["rate"]) for row in rows]
        ),
        data={
            "model": name,
            "threads": threads,
            "tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "results": {label: list(rounds_of_side) for label, rounds_of_side in results.items()},
            "shares": {"first": dict(shares[0]), "next": dict(shares[1])},
        },
    )


def _row(label: str, rounds: Sequence[Mapping[str, Any]], float32: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, token, exact_first, exact_token = (
        [each[key] for each in side] for side in (rounds, float32) for key in ("first_seconds", "token_seconds")
    )
    return {
        "label": label,
        "first": 1e3 * median(first),
        "first_ratio": median_ratio(exact_first, first),
        "rate": 1 / median(token),
        "rate_ratio": median_ratio(exact_token, token),
        "peak": rounds[-1]["peak_bytes"] / MIB,
    }
