"""Export with the whole proof against optimum-cli, which checks one shape: a CLIP ViT-B/32 as transformers saves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.measuring import save_original
from benchmarks.report import MIB, Bars, Report, table
from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.lab.timing import Spread, interleaved, ratios

MOST_TIMES, AIM = 1.0, 0.7
MOST_BYTES = 900 * MIB
_SAMPLE_SECONDS = 0.05
_OURS, _THEIRS = "vlm-export", "optimum-cli"
_NAME = "clip-vit-base-patch32-hf"


@dataclass(frozen=True)
class Run:
    """One command as a process.

    Attributes:
        cpu: seconds of it and of its children.
        peak_bytes: anonymous memory of the largest of them.
    """

    seconds: float
    cpu: float
    peak_bytes: int


def measure(optimum: Path, rounds: int) -> Report:
    """Exports in turn, `rounds` times each after one that warms up.

    Args:
        optimum: `optimum-cli` of an environment with optimum-onnx.
    """
    with TemporaryDirectory() as folder:
        checkpoint, target = Path(folder) / "checkpoint", Path(folder) / "exported"
        add_vocabulary(save_original(_NAME, checkpoint))
        theirs = [str(optimum), "export", "onnx", "--task", "zero-shot-image-classification", "--model"]
        commands = {
            _OURS: [sys.executable, "-m", "vlm_export", "export", str(checkpoint), "--quiet", "-o", str(target)],
            _THEIRS: [*theirs, str(checkpoint), str(target)],
        }
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        sides = {name: _side(command, target, runs[name]) for name, command in commands.items()}
        for side in sides.values():
            side()
        for each in runs.values():
            each.clear()
        interleaved(sides, rounds, lambda number: print(f"round {number} of {rounds}", file=sys.stderr))
    return _report(runs)


def add_vocabulary(folder: Path) -> None:
    """OpenAI's vocabulary as transformers saves it; open_clip's copy of it."""
    tokens = import_module("open_clip.tokenizer").SimpleTokenizer()
    own = dict(zip(tokens.all_special_ids, ("<|startoftext|>", "<|endoftext|>"), strict=False))
    vocabulary = {own.get(number, token): number for token, number in tokens.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in sorted(tokens.bpe_ranks, key=tokens.bpe_ranks.get))]
    names = folder / "vocab.json", folder / "merges.txt"
    names[0].write_text(json.dumps(vocabulary), encoding="utf-8")
    names[1].write_text("\n".join(merges) + "\n", encoding="utf-8")
    import_module("transformers").CLIPTokenizerFast(*map(str, names), model_max_length=77).save_pretrained(folder)


def _side(command: Sequence[str], target: Path, runs: list[Run]) -> Callable[[], float]:
    def run() -> float:
        rmtree(target, ignore_errors=True)
        runs.append(run_command(command))
        return runs[-1].seconds

    return run


def run_command(command: Sequence[str]) -> Run:
    """Runs a command to its end; SystemExit with what it printed where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            peak = 0
            while True:
                peak = max(peak, *(anonymous_bytes(pid) or 0 for pid in (process.pid, *_children(process.pid))))
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                time.sleep(_SAMPLE_SECONDS)
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command[0]} ended with status {process.returncode}: {log.read_text()[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _report(runs: Mapping[str, Sequence[Run]]) -> Report:
    seconds = {name: [run.seconds for run in each] for name, each in runs.items()}
    times = ratios(seconds[_OURS], seconds[_THEIRS])
    spread, peak = Spread.of(times), max(run.peak_bytes for run in runs[_OURS])
    rows = [
        {
            "name": name,
            "seconds": median(seconds[name]),
            "cpu": median(run.cpu for run in each),
            "peak": max(run.peak_bytes for run in each) / MIB,
        }
        for name, each in runs.items()
    ]
    columns = {
        "": "{name}",
        "wall time, s": "{seconds:.1f}",
        "processor time, s": "{cpu:.1f}",
        "most anonymous memory of one process, MiB": "{peak:,.0f}",
    }
    reached = spread.median <= MOST_TIMES and peak <= MOST_BYTES
    return Report(
        title="Export with its proof against optimum-cli",
        goal=f"at most {MOST_TIMES} times optimum-cli's time (aim: {AIM}), and {MOST_BYTES / MIB:,.0f} MiB.",
        reached=reached,
        conclusion=f"{spread.median:.2f} times its time (middle half of {len(times)} pairs: {spread.low:.2f} to "
        f"{spread.high:.2f}), and {peak / MIB:,.0f} MiB.",
        tables=(
            table(
                f"{_NAME} with random weights, as transformers saves it; medians of whole processes in turn",
                columns,
                rows,
            ),
        ),
        bars=Bars("Wall time of an export", "s", [(name, median(each)) for name, each in seconds.items()]),
        data={"runs": {name: [vars(run) for run in each] for name, each in runs.items()}, "ratios": times},
    )
