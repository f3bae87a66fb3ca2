"""From the start of a process to its first embedding."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.embed import bare_encoder
from benchmarks.measuring import bundle_or_random
from benchmarks.report import Bars, Report, table
from vlm_export.lab.timing import Spread, ratios

GOAL_SECONDS = 0.6
MOST_TIMES_FASTEMBED = 0.7
PARTS = ("vision", "text")
OPTIONS = {"default": {}, "earliest": {"weights": "mapped", "verify": "size"}}
STEPS = ("start Python", "import", "open bundle", "check files", "open session", "first run")
# Runs in a process of its own that imports nothing but vlm_export and what that needs.
_CHILD = """
import json, sys, time
marks = [float(sys.argv[1]), time.time()]
from vlm_export import load
marks.append(time.time())
pair = load(sys.argv[2], **json.loads(sys.argv[4]))
marks.append(time.time())
part = sys.argv[3]
pair.session.bundle.graph_file(pair.manifest.part(part).variant("fp32"))
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
# The same image in a model of fastembed's, whose files are the bundle's image part.
_FASTEMBED = """
import sys, time
from PIL import Image
from fastembed import ImageEmbedding
model = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=sys.argv[2])
next(iter(model.embed([Image.new("RGB", (640, 480), "teal")])))
print([time.time() - float(sys.argv[1])])
"""


def measure(name: str, bundle: Path | None, rounds: int, fastembed: Path | None = None) -> Report:
    """Parts and options in turn, each in a new process, `rounds` times; the first round warms the disk cache up.

    Args:
        fastembed: the Python of an environment with fastembed, to compare with.
    """
    sides = {f"{part}, {options}": (part, options) for part in PARTS for options in OPTIONS}
    with bundle_or_random(name, bundle) as directory, TemporaryDirectory() as folder:
        bare = Path(folder) / "bare"
        if fastembed is not None:
            bare_encoder(directory, bare)
        runs: dict[str, list[list[float]]] = {side: [] for side in sides}
        others: list[float] = []
        for _ in range(rounds + 1):
            for side, (part, options) in sides.items():
                words = [str(directory.resolve()), part, json.dumps(OPTIONS[options])]
                runs[side].append(_run(sys.executable, _CHILD, *words))
            if fastembed is not None:
                others += _run(str(fastembed), _FASTEMBED, str(bare))
    return _report(name, rounds, {side: each[1:] for side, each in runs.items()}, others[1:])


def _report(name: str, rounds: int, runs: Mapping[str, Sequence[Sequence[float]]], others: Sequence[float]) -> Report:
    totals = {side: median(map(sum, each)) for side, each in runs.items()}
    steps: list[dict[str, Any]] = [
        {"step": step, **{side: median(run[i] for run in runs[side]) for side in runs}} for i, step in enumerate(STEPS)
    ]
    bars = [(f"{side}: {row['step']}", row[side]) for side in runs for row in steps]
    columns = {"step": "{step}", **{side: f"{{{side}:.3f}}" for side in runs}}
    earliest = [sum(run) for run in runs["vision, earliest"]]
    times = Spread.of(ratios(earliest, others)) if others else None
    told = "" if times is None else f"; {times.median:.2f} times fastembed's for an image ({median(others):.2f} s)"
    slow = max(totals[side] for side in runs if side.endswith("earliest")) > GOAL_SECONDS
    return Report(
        title="First embedding after process start",
        goal=f"at most {GOAL_SECONDS} s for ViT-B/32 with mapped weights that are compared by size, and "
        f"{MOST_TIMES_FASTEMBED} times fastembed's.",
        reached=not slow and (times is None or times.median <= MOST_TIMES_FASTEMBED),
        conclusion=", ".join(f"{side} {total:.2f} s" for side, total in totals.items()) + told + ".",
        tables=(
            table(
                f'{name}, seconds, median of {rounds} processes; earliest: weights="mapped", verify="size"',
                columns,
                [*steps, {"step": "total", **totals}],
            ),
        ),
        bars=Bars("Steps to the first embedding", "s", bars),
        data={"model": name, "steps": STEPS, "totals": totals, "rounds": runs, "fastembed": others},
    )


def _run(python: str, code: str, *words: str) -> list[float]:
    done = subprocess.run(
        [python, "-c", code, str(time.time()), *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"the measured process ended with status {done.returncode}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds
