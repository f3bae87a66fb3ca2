"""Bytes of each precision of real sizes with random weights, of float32's; quantised by `vlm_export.quantize`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import vlm_export
from benchmarks.measuring import ANY_LOSS, export_random
from benchmarks.report import MIB, Bars, Report, table
from vlm_export.bundle.manifest import Manifest, PartRecord
from vlm_export.bundle.opened import open_bundle
from vlm_export.precision.recipes import QUANTISED

GOALS: Mapping[str, float] = {"fp16": 0.52, "int8": 0.30, "int8-static": 0.30, "w8a16": 0.30, "int4": 0.20}
"""Precision → the most of float32's bytes that a model may have; int4's is of models with a decoder."""
_LARGEST_KEPT = 3


def measure(names: Sequence[str], precision: Sequence[str] = QUANTISED) -> Report:
    """Exports each in float32 and float16 and quantises it to each precision, one after the other."""
    models, rows = [], []
    for name in names:
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / name
            print(f"exporting {name}", file=sys.stderr)
            export_random(name, bundle, "--precision", "fp32", "--precision", "fp16")
            for each in precision:
                print(f"quantising {name} to {each}", file=sys.stderr)
                vlm_export.quantize(bundle, each, budget=ANY_LOSS)
            manifest = open_bundle(bundle).manifest
        rows += [_part_row(name, manifest, part, each) for part in manifest.parts for each in ("fp16", *precision)]
        models += [_model_row(name, manifest, each) for each in ("fp16", *precision)]
        # Without a tokenizer no text leads to some parts, so that their ranges cannot be calibrated.
        models = [row for row in models if row["whole"] or row["precision"] != "int8-static"]
    return report_from_rows(models, [row for row in rows if row], precision)


def _part_row(name: str, manifest: Manifest, part: PartRecord, precision: str) -> dict[str, Any]:
    found = [variant for variant in part.variants if variant.precision == precision]
    if not found:
        return {}
    size, float32 = _bytes(manifest, part, precision), _bytes(manifest, part, "fp32")
    kept = {} if found[0].loss is None else found[0].loss.kept
    return {
        "label": f"{name}, {part.name}",
        "precision": precision,
        "bytes": size,
        "mib": size / MIB,
        "share": size / float32,
        "kept": ", ".join(list(kept)[:_LARGEST_KEPT]) + (", …" if len(kept) > _LARGEST_KEPT else ""),
    }


def _model_row(name: str, manifest: Manifest, precision: str) -> dict[str, Any]:
    """All parts together as the runtime loads them: a part without such a variant counts in float32."""
    sizes = [_bytes(manifest, part, part.served_by(precision).precision) for part in manifest.parts]
    float32 = sum(_bytes(manifest, part, "fp32") for part in manifest.parts)
    has_decoder = any(task.kind in ("caption", "answer", "chat") for task in manifest.tasks)
    goal = None if precision == "int4" and not has_decoder else GOALS[precision]
    share = sum(sizes) / float32
    return {
        "label": name,
        "precision": precision,
        "whole": all(precision in {variant.precision for variant in part.variants} for part in manifest.parts),
        "bytes": sum(sizes),
        "mib": sum(sizes) / MIB,
        "share": share,
        "goal": "-" if goal is None else f"{goal:.2f}",
        "reached": goal is None or share <= goal,
    }


def _bytes(manifest: Manifest, part: PartRecord, precision: str) -> int:
    variant = part.variant(precision)
    return sum(manifest.files[name].size_bytes for name in (variant.file, *variant.external_data))


def report_from_rows(
    models: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]], precision: Sequence[str]
) -> Report:
    """The page: a row for each precision of a model, and of each of its parts."""
    missed = [row for row in models if not row["reached"]]
    columns = {"": "{label}", "precision": "{precision}", "MiB": "{mib:,.1f}", "of float32": "{share:.3f}"}
    told = "; ".join(f"{row['label']} in {row['precision']}: {row['share']:.3f}" for row in missed)
    return Report(
        title="Sizes of the precisions",
        goal=f"of float32's bytes at most {GOALS['fp16']} in fp16, {GOALS['int8']} with weights of 8 bits, and "
        f"{GOALS['int4']} in int4 for models with a decoder.",
        reached=not missed,
        conclusion=f"above it: {told}." if missed else "every model is within it.",
        tables=(
            table("Models: all graphs with their weights", columns | {"goal": "{goal}"}, models),
            table("Parts, and weights that stay in float32", columns | {"in float32": "{kept}"}, parts),
        ),
        bars=Bars(
            "Share of float32's bytes", "", [(f"{row['label']}, {row['precision']}", row["share"]) for row in models]
        ),
        data={"models": list(models), "parts": list(parts), "precisions": list(precision)},
    )
