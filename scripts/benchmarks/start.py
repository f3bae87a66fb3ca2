"""From the start of a process to its first embedding."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.export import export_random
from benchmarks.report import Bars, Report, Table

GOAL_SECONDS = 2.0
PARTS = ("vision", "text")
STEPS = ("start Python", "import", "open bundle", "check files", "open session", "first run")
# Runs in a process of its own that imports nothing but vlm_export and what that needs.
_CHILD = """
import sys, time
marks = [float(sys.argv[1]), time.time()]
from vlm_export import load
marks.append(time.time())
pair = load(sys.argv[2])
marks.append(time.time())
part = sys.argv[3]
pair.session.bundle.model_files(pair.manifest.part(part).variant("fp32"))
marks.append(time.time())
pair.session.engine(part)
marks.append(time.time())
if part == "vision":
    from PIL import Image
    pair.encode_image([Image.new("RGB", (640, 480), "teal")])
else:
    pair.encode_ids([[1, 2, 3, pair.session.text_spec.end_token_id]])
marks.append(time.time())
assert "torch" not in sys.modules
print([after - before for before, after in zip(marks, marks[1:])])
"""


def measure(name: str, bundle: Path | None, rounds: int) -> Report:
    """Both parts in turn, each in a new process, `rounds` times; the first round warms the disk cache up."""
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / name
            export_random(name, bundle, "--no-tokenizer")
        runs = {part: [_run(bundle, part) for _ in range(rounds + 1)][1:] for part in PARTS}
    steps = {part: [median(run[i] for run in runs[part]) for i in range(len(STEPS))] for part in PARTS}
    totals = {part: median(sum(run) for run in runs[part]) for part in PARTS}
    slowest = max(totals.values())
    return Report(
        name="start",
        title="First embedding after process start",
        goal=f"at most {GOAL_SECONDS:.0f} s for ViT-B/32.",
        reached=slowest <= GOAL_SECONDS,
        conclusion=", ".join(f"{part} {total:.2f} s" for part, total in totals.items()) + ".",
        command=f"python scripts/benchmark.py start --name {name}",
        tables=(_table(name, rounds, steps, totals),),
        bars=Bars("Steps to the first embedding", "s", _bars(steps)),
        data={"model": name, "steps": STEPS, "totals": totals, "rounds": runs},
    )


def _run(bundle: Path, part: str) -> list[float]:
    command = [sys.executable, "-c", _CHILD, str(time.time()), str(bundle.resolve()), part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measured process ended with status {done.returncode}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def _table(name: str, rounds: int, steps: Mapping[str, list[float]], totals: Mapping[str, float]) -> Table:
    rows = [(step, *(f"{steps[part][i]:.3f}" for part in PARTS)) for i, step in enumerate(STEPS)]
    total = ("total", *(f"{totals[part]:.3f}" for part in PARTS))
    return Table(f"{name}, seconds, median of {rounds} processes", ("step", *PARTS), [*rows, total])


def _bars(steps: Mapping[str, list[float]]) -> list[tuple[str, float]]:
    return [(f"{part}: {step}", steps[part][i]) for part in PARTS for i, step in enumerate(STEPS)]
