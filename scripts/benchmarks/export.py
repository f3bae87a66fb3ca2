"""Time and peak anonymous memory of each stage of an export, of full-size models with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.report import Bars, Report, Table

MIB = 1 << 20
GOAL_BYTES = 1_000_000_000
# Verification runs two models in memory on purpose, and what it allocated stays with the process. It comes after all
# graphs are written, so the stages before it show what exporting takes.
_VERIFICATION = ("load reference", "verify", "record golden")


def export_random(name: str, target: Path, *options: str) -> dict[str, Any]:
    """Exports a known architecture with random weights in a process of its own; returns what `--json` prints."""
    command = [sys.executable, "-m", "vlm_export.cli.main", "export", name, "-o", str(target)]
    done = subprocess.run(
        [*command, "--random-weights", "0", "--json", *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"exporting {name} ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(names: tuple[str, ...]) -> Report:
    """Exports each, one after the other."""
    results = {}
    for name in names:
        print(f"exporting {name}", file=sys.stderr)
        with TemporaryDirectory() as folder:
            results[name] = _facts(export_random(name, Path(folder) / name, "--no-tokenizer"))
    peaks = {name: result["peak_export_bytes"] for name, result in results.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    memory = [("weights of " + name, result["weights_bytes"] / MIB) for name, result in results.items()]
    return Report(
        name="export",
        title="Exporting full-size models",
        goal="peak anonymous memory of the export stages below 1 GB for every model.",
        reached=all(peak < GOAL_BYTES for peak in peaks.values()),
        conclusion=f"at most {peaks[worst] / MIB:,.0f} MiB, for {worst}.",
        command=f"python scripts/benchmark.py export --names {' '.join(names)}",
        tables=(_summary(results), _stages(results)),
        bars=Bars(
            "Weights of the bundle against peak anonymous memory of the export stages",
            "MiB",
            [*memory, *(("peak of " + name, peak / MIB) for name, peak in peaks.items())],
        ),
        data={"results": results},
    )


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    stages = result["stages"]
    files = result["manifest"]["files"]
    exporting = list(takewhile(lambda stage: not stage["name"].startswith(_VERIFICATION), stages))
    return {
        "weights_bytes": sum(file["size_bytes"] for name, file in files.items() if name.startswith("onnx/")),
        "seconds": sum(stage["seconds"] for stage in stages),
        "export_seconds": sum(stage["seconds"] for stage in exporting),
        "peak_export_bytes": _peak(exporting),
        "peak_bytes": _peak(stages),
        "verified": all(report["passed"] for report in result["verification"]),
        "stages": stages,
    }


def _peak(stages: Iterable[Mapping[str, Any]]) -> int:
    return max((stage["peak_anonymous_bytes"] or 0 for stage in stages), default=0)


def _summary(results: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("model", "weights, MiB", "export stages, s", "all stages, s", "peak of export stages, MiB", "peak, MiB")
    rows = [
        (
            name,
            f"{result['weights_bytes'] / MIB:,.0f}",
            f"{result['export_seconds']:.1f}",
            f"{result['seconds']:.1f}",
            f"{result['peak_export_bytes'] / MIB:,.0f}",
            f"{result['peak_bytes'] / MIB:,.0f}",
        )
        for name, result in results.items()
    ]
    return Table("Models; export stages are all up to the last written graph, before verification", header, rows)


def _stages(results: Mapping[str, Mapping[str, Any]]) -> Table:
    by_model = {name: {stage["name"]: stage for stage in result["stages"]} for name, result in results.items()}
    names = dict.fromkeys(stage for stages in by_model.values() for stage in stages)
    rows = [(name, *(_cell(stages.get(name)) for stages in by_model.values())) for name in names]
    return Table("Stages: seconds and peak anonymous memory of the process in MiB", ("stage", *by_model), rows)


def _cell(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return ""
    return f"{stage['seconds']:.2f} s, {(stage['peak_anonymous_bytes'] or 0) / MIB:,.0f}"
