"""From the start of a process to its first embedding."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import bundle_or_random
from benchmarks.report import Bars, Report, table

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
    with bundle_or_random(name, bundle) as directory:
        runs = {part: [_run(directory, part) for _ in range(rounds + 1)][1:] for part in PARTS}
    totals = {part: median(sum(run) for run in runs[part]) for part in PARTS}
    steps: list[dict[str, Any]] = [
        {"step": step, **{part: median(run[i] for run in runs[part]) for part in PARTS}} for i, step in enumerate(STEPS)
    ]
    bars = [(f"{part}: {row['step']}", row[part]) for part in PARTS for row in steps]
    columns = {"step": "{step}", **{part: f"{{{part}:.3f}}" for part in PARTS}}
    return Report(
        title="First embedding after process start",
        goal=f"at most {GOAL_SECONDS:.0f} s for ViT-B/32.",
        reached=max(totals.values()) <= GOAL_SECONDS,
        conclusion=", ".join(f"{part} {total:.2f} s" for part, total in totals.items()) + ".",
        tables=(
            table(f"{name}, seconds, median of {rounds} processes", columns, [*steps, {"step": "total", **totals}]),
        ),
        bars=Bars("Steps to the first embedding", "s", bars),
        data={"model": name, "steps": STEPS, "totals": totals, "rounds": runs},
    )


def _run(bundle: Path, part: str) -> list[float]:
    command = [sys.executable, "-c", _CHILD, str(time.time()), str(bundle.resolve()), part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measured process ended with status {done.returncode}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds
