"""What the benchmarks share: a bundle of random weights to measure, and times of several sides in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.family import Checkpoint
from vlm_export.models.registry import load_family


def export_random(name: str, target: Path, *options: str) -> dict[str, Any]:
    """Exports a known architecture with random weights in a process of its own; returns what `--json` prints."""
    command = [sys.executable, "-m", "vlm_export", "export", name, "-o", str(target), "--no-tokenizer", *options]
    done = subprocess.run([*command, "--random-weights", "0", "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"exporting {name} ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def random_original(name: str, weights: Path) -> Checkpoint:
    """The checkpoint of the weights that `export_random` exports, in the published form, with its config.json."""
    known = load_known(name)
    family = load_family(known.family)
    published, config = family.published_tensors(known.architecture), family.published_config(known.architecture)
    return random_checkpoint(name, published, 0, weights, config)


@contextmanager
def bundle_or_random(name: str, bundle: Path | None) -> Iterator[Path]:
    """The bundle, or one of random weights that lasts as long as its measurement."""
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / name
            export_random(name, bundle)
        yield bundle


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int, what: str) -> dict[str, list[float]]:
    """Seconds of each side in each round, one side after the other, after a round that warms up."""
    print(f"{what}: {rounds} rounds", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long the first took: the median of the rounds'."""
    return float(median(a / b for a, b in zip(times, others, strict=True)))
