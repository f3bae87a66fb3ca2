"""Time and peak anonymous memory of each stage of an export, of full-size models with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def measure(
    names: Sequence[str], precisions: Sequence[str] = (), parts: Sequence[str] = (), report_name: str = "export"
) -> Report:
    """Exports each, one after the other.

    Args:
        precisions: variants of each part, () for the default.
        parts: only these, () for all.
        report_name: of the files, so that several sets of models keep a page each.
    """
    chosen = [("--precision", precisions), ("--part", parts)]
    options = [text for option, values in chosen for value in values for text in (option, value)]
    results = {}
    for name in names:
        print(f"exporting {name}", file=sys.stderr)
        with TemporaryDirectory() as folder:
            results[name] = _facts(export_random(name, Path(folder) / name, "--no-tokenizer", *options))
    peaks = {name: result["peak_export_bytes"] for name, result in results.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    memory = [("weights of " + name, result["weights_bytes"] / MIB) for name, result in results.items()]
    return Report(
        name=report_name,
        title="Exporting full-size models",
        goal="peak anonymous memory of the export stages below 1 GB for every model.",
        reached=all(peak < GOAL_BYTES for peak in peaks.values()),
        conclusion=f"at most {peaks[worst] / MIB:,.0f} MiB, for {worst}.",
        command=" ".join(("python scripts/benchmark.py export", *_arguments(names, precisions, parts, report_name))),
        tables=(_summary(results), _variants(results), _stages(results), *_not_run(results)),
        bars=Bars(
            "Weights of the bundle against peak anonymous memory of the export stages",
            "MiB",
            [*memory, *(("peak of " + name, peak / MIB) for name, peak in peaks.items())],
        ),
        data={"results": results},
    )


def _arguments(
    names: Sequence[str], precisions: Sequence[str], parts: Sequence[str], report_name: str
) -> Iterator[str]:
    report = () if report_name == "export" else (report_name,)
    chosen = (("--names", names), ("--precision", precisions), ("--part", parts), ("--report", report))
    return (text for option, values in chosen if values for text in (option, *values))


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
        "variants": list(_variant_facts(result)),
        "stages": stages,
    }


def _variant_facts(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Size and worst numbers of each variant of each part."""
    files = result["manifest"]["files"]
    for part in result["manifest"]["parts"]:
        for variant in part["variants"]:
            verification = variant["verification"]
            worst = verification["worst"].values()
            yield {
                "part": part["name"],
                "precision": variant["precision"],
                "size_bytes": sum(files[name]["size_bytes"] for name in (variant["file"], *variant["external_data"])),
                "points": sum(verification["points"].values()),
                "max_abs": max(output["max_abs"] for output in worst),
                "cosine": min(output["cosine"] for output in worst),
                "not_run": verification["not_run"],
                "warnings": variant["warnings"],
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


def _variants(results: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("model, part, precision", "size, MiB", "points compared", "max-abs", "cosine")
    rows = [
        (
            f"{name}, {variant['part']}, {variant['precision']}",
            f"{variant['size_bytes'] / MIB:,.1f}",
            str(variant["points"]),
            f"{variant['max_abs']:.1e}",
            f"{variant['cosine']:.6f}",
        )
        for name, result in results.items()
        for variant in result["variants"]
    ]
    return Table("Graphs with their weights, and the worst numbers of their verification", header, rows)


def _not_run(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    rows = [
        (f"{name}, {variant['part']}, {variant['precision']}", text)
        for name, result in results.items()
        for variant in result["variants"]
        for text in variant["not_run"]
    ]
    if rows:
        yield Table("What the verification of large parts left out", ("model, part, precision", "not run"), rows)


def _stages(results: Mapping[str, Mapping[str, Any]]) -> Table:
    by_model = {name: {stage["name"]: stage for stage in result["stages"]} for name, result in results.items()}
    names = dict.fromkeys(stage for stages in by_model.values() for stage in stages)
    rows = [(name, *(_cell(stages.get(name)) for stages in by_model.values())) for name in names]
    return Table("Stages: seconds and peak anonymous memory of the process in MiB", ("stage", *by_model), rows)


def _cell(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return ""
    return f"{stage['seconds']:.2f} s, {(stage['peak_anonymous_bytes'] or 0) / MIB:,.0f}"
