"""Time and peak anonymous memory of each stage of an export, of full-size models with random weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring import export_random
from benchmarks.report import MIB, Bars, Report, Table, table

GOAL_BYTES = 1_000_000_000
# Verification runs two models in memory on purpose, and what it allocated stays with the process. It comes after all
# graphs are written, so the stages before it show what exporting takes.
_VERIFICATION = ("load reference", "verify", "record golden")
_VARIANT = {"model, part, precision": "{model}, {part}, {precision}"}


def measure(names: Sequence[str], precision: Sequence[str] = (), part: Sequence[str] = ()) -> Report:
    """Exports each, one after the other.

    Args:
        precision: variants of each part, () for the default.
        part: only these, () for all.
    """
    chosen = [("--precision", precision), ("--part", part)]
    options = [text for option, values in chosen for value in values for text in (option, value)]
    results = {}
    for name in names:
        print(f"exporting {name}", file=sys.stderr)
        with TemporaryDirectory() as folder:
            results[name] = _facts(export_random(name, Path(folder) / name, *options))
    peaks = {name: result["peak_export_bytes"] for name, result in results.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    memory = [("weights of " + name, result["weights_bytes"] / MIB) for name, result in results.items()]
    return Report(
        title="Exporting full-size models",
        goal="peak anonymous memory of the export stages below 1 GB for every model.",
        reached=all(peak < GOAL_BYTES for peak in peaks.values()),
        conclusion=f"at most {peaks[worst] / MIB:,.0f} MiB, for {worst}.",
        tables=tuple(_tables(results)),
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


def _tables(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    models = [
        {"model": name, **result, "mib": {key: value / MIB for key, value in result.items() if key.endswith("_bytes")}}
        for name, result in results.items()
    ]
    columns = {
        "model": "{model}",
        "weights, MiB": "{mib[weights_bytes]:,.0f}",
        "export stages, s": "{export_seconds:.1f}",
        "all stages, s": "{seconds:.1f}",
        "peak of export stages, MiB": "{mib[peak_export_bytes]:,.0f}",
        "peak, MiB": "{mib[peak_bytes]:,.0f}",
    }
    yield table("Models; export stages are all up to the last written graph, before verification", columns, models)
    variants = [
        {"model": name, **variant, "mib": variant["size_bytes"] / MIB}
        for name, result in results.items()
        for variant in result["variants"]
    ]
    sizes = {"size, MiB": "{mib:,.1f}", "points compared": "{points}"}
    worst = {"max-abs": "{max_abs:.1e}", "cosine": "{cosine:.6f}"}
    title = "Graphs with their weights, and the worst numbers of their verification"
    yield table(title, _VARIANT | sizes | worst, variants)
    yield _stages(results)
    left_out = [{**variant, "text": text} for variant in variants for text in variant["not_run"]]
    if left_out:
        yield table("What the verification of large parts left out", _VARIANT | {"not run": "{text}"}, left_out)


def _stages(results: Mapping[str, Mapping[str, Any]]) -> Table:
    by_model = {name: {stage["name"]: stage for stage in result["stages"]} for name, result in results.items()}
    names = dict.fromkeys(stage for stages in by_model.values() for stage in stages)
    rows = [(name, *(_cell(stages.get(name)) for stages in by_model.values())) for name in names]
    return Table("Stages: seconds and peak anonymous memory of the process in MiB", ("stage", *by_model), rows)


def _cell(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return ""
    return f"{stage['seconds']:.2f} s, {(stage['peak_anonymous_bytes'] or 0) / MIB:,.0f}"
