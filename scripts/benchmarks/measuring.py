"""What the benchmarks share: a bundle of random weights to measure, and times of several sides in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.family import Checkpoint
from vlm_export.lab import timing
from vlm_export.models.registry import load_family

ANY_LOSS = {"cosine": 0.0, "mean-cosine": 0.0}
"""A budget for bundles of `export_random`: what random weights lose says nothing. Without a tokenizer no ranking and no
words are measured, and a budget may not state them then."""


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


def save_original(name: str, folder: Path) -> Path:
    """That checkpoint of a CLIPModel, with its image processor, in the files that transformers saves."""
    folder.mkdir()
    checkpoint = random_original(name, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config or {})), encoding="utf-8")
    import_module("transformers").CLIPImageProcessor().save_pretrained(folder)
    return folder


@contextmanager
def bundle_or_random(name: str, bundle: Path | None) -> Iterator[Path]:
    """The bundle, or one of random weights that lasts as long as its measurement."""
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / name
            export_random(name, bundle)
        yield bundle


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int, what: str) -> dict[str, list[float]]:
    """Seconds of each side in each round, one side after the other, after a run of each that warms up."""
    print(f"{what}: {rounds} rounds", file=sys.stderr)
    return timing.interleaved({name: timing.timed(run) for name, run in sides.items()}, rounds)
