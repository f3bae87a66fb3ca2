"""Short captions at their own length against the same captions padded to the context length."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.export import export_random
from benchmarks.report import Bars, Report, Table
from vlm_export import Model, load

TOKENS = 8
BATCHES = (1, 8, 32)
GOAL_RATIO = 4.0
GOAL_DIFFERENCE = 1e-5
_WARM_UP = 3
Ids = npt.NDArray[np.int64]


def measure(name: str, bundle: Path | None, rounds: int) -> Report:
    """Both forms in turn, `rounds` times for each batch size."""
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / name
            export_random(name, bundle, "--no-tokenizer")
        model = load(bundle)
        results = [_measure_batch(model, batch, rounds) for batch in BATCHES]
    slowest = min(result["ratio"] for result in results)
    difference = max(result["max_abs_difference"] for result in results)
    context = results[0]["padded_tokens"]
    rows = [
        (
            str(result["batch"]),
            f"{result['short_ms']:.2f}",
            f"{result['padded_ms']:.2f}",
            f"{result['ratio']:.1f}",
            f"{result['max_abs_difference']:.1e}",
        )
        for result in results
    ]
    bars = [
        (f"batch {result['batch']}, {tokens} tokens", result[key] / result["batch"])
        for result in results
        for tokens, key in ((TOKENS, "short_ms"), (context, "padded_ms"))
    ]
    header = ("batch", f"{TOKENS} tokens, ms", f"padded to {context}, ms", "ratio", "max-abs difference")
    return Report(
        name="text",
        title="What short captions cost",
        goal=f"{TOKENS}-token captions at least {GOAL_RATIO:.0f} times faster than padded, embeddings equal within "
        f"{GOAL_DIFFERENCE:g} (unit length).",
        reached=slowest >= GOAL_RATIO and difference <= GOAL_DIFFERENCE,
        conclusion=f"at least {slowest:.1f} times faster, embeddings differ by at most {difference:.1e}.",
        command=f"python scripts/benchmark.py text --name {name}",
        tables=(Table(f"{name}, {rounds} interleaved rounds; medians, ratio: median of the pairs'", header, rows),),
        bars=Bars("Time for one caption", "ms", bars),
        data={"model": name, "tokens": TOKENS, "rounds": rounds, "results": results},
    )


def _measure_batch(model: Model, batch: int, rounds: int) -> dict[str, Any]:
    short, padded = captions(model, batch)
    for _ in range(_WARM_UP):
        difference = np.abs(model.encode_ids(short) - model.encode_ids(padded)).max()
    times = [(_seconds(model, short), _seconds(model, padded)) for _ in range(rounds)]
    print(f"batch {batch}: {rounds} rounds", file=sys.stderr)
    return {
        "batch": batch,
        "padded_tokens": padded.shape[1],
        "short_ms": 1e3 * median(first for first, _ in times),
        "padded_ms": 1e3 * median(second for _, second in times),
        "ratio": median(second / first for first, second in times),
        "max_abs_difference": float(difference),
    }


def captions(model: Model, batch: int) -> tuple[Ids, Ids]:
    """Random captions of TOKENS tokens, end-of-text last, and the same rows filled to the context length."""
    spec = model.session.text_spec
    short = np.random.default_rng(0).integers(1, spec.end_token_id - 1, (batch, TOKENS), dtype=np.int64)
    short[:, -1] = spec.end_token_id
    padded = np.full((batch, spec.context_length), spec.pad_token_id, dtype=np.int64)
    padded[:, :TOKENS] = short
    return short, padded


def _seconds(model: Model, ids: Ids) -> float:
    start = time.perf_counter()
    model.encode_ids(ids)
    return time.perf_counter() - start
