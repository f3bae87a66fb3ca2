"""Short captions at their own length against the same captions padded to the context length."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import bundle_or_random, interleaved
from benchmarks.report import Bars, Report, table
from vlm_export import Model, load
from vlm_export.lab.timing import median_ratio

TOKENS = 8
BATCHES = (1, 8, 32)
GOAL_RATIO = 4.0
GOAL_DIFFERENCE = 1e-5
Ids = npt.NDArray[np.int64]


def measure(name: str, bundle: Path | None, rounds: int) -> Report:
    """Both forms in turn, `rounds` times for each batch size."""
    with bundle_or_random(name, bundle) as directory:
        model = load(directory)
        results = [_measure_batch(model, batch, rounds) for batch in BATCHES]
    slowest = min(result["ratio"] for result in results)
    difference = max(result["max_abs_difference"] for result in results)
    context = results[0]["padded_tokens"]
    columns = {
        "batch": "{batch}",
        f"{TOKENS} tokens, ms": "{short_ms:.2f}",
        f"padded to {context}, ms": "{padded_ms:.2f}",
        "ratio": "{ratio:.1f}",
        "max-abs difference": "{max_abs_difference:.1e}",
    }
    bars = [
        (f"batch {result['batch']}, {tokens} tokens", result[key] / result["batch"])
        for result in results
        for tokens, key in ((TOKENS, "short_ms"), (context, "padded_ms"))
    ]
    return Report(
        title="What short captions cost",
        goal=f"{TOKENS}-token captions at least {GOAL_RATIO:.0f} times faster than padded, embeddings equal within "
        f"{GOAL_DIFFERENCE:g} (unit length).",
        reached=slowest >= GOAL_RATIO and difference <= GOAL_DIFFERENCE,
        conclusion=f"at least {slowest:.1f} times faster, embeddings differ by at most {difference:.1e}.",
        tables=(table(f"{name}, {rounds} interleaved rounds; medians, ratio: median of the pairs'", columns, results),),
        bars=Bars("Time for one caption", "ms", bars),
        data={"model": name, "tokens": TOKENS, "rounds": rounds, "results": results},
    )


def _measure_batch(model: Model, batch: int, rounds: int) -> dict[str, Any]:
    short, padded = captions(model, batch)
    difference = np.abs(model.encode_ids(short) - model.encode_ids(padded)).max()
    sides = {"short": lambda: model.encode_ids(short), "padded": lambda: model.encode_ids(padded)}
    times = interleaved(sides, rounds, f"batch {batch}")
    return {
        "batch": batch,
        "padded_tokens": padded.shape[1],
        **{f"{name}_ms": 1e3 * median(seconds) for name, seconds in times.items()},
        "ratio": median_ratio(times["padded"], times["short"]),
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
