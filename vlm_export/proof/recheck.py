"""Proves a bundle again on this machine, with this engine, from its golden records: without torch and onnx."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from vlm_export.bundle.ledger import check_ledger
from vlm_export.bundle.manifest import PartRecord, VariantRecord, is_ir
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.proof.engine import openvino_label
from vlm_export.proof.floor import ELSEWHERE, Floor, FloorJudge, floor_from_json
from vlm_export.proof.gates import Gate, variant_gate
from vlm_export.proof.golden import GoldenRecord, iterate_golden
from vlm_export.proof.points import EngineRun, PointResult, judge_point
from vlm_export.proof.quantised_weights import check_quantised_weights
from vlm_export.proof.report import PartReport
from vlm_export.proof.verifier import Progress

EngineFactory = Callable[[str, str], EngineRun]
"""Part name and precision → what executes that graph."""


def verify_bundle(
    bundle: OpenBundle,
    *,
    engine_factory: EngineFactory,
    engine_name: str = "engine",
    precision: str | None = None,
    progress: Progress | None = None,
) -> list[PartReport]:
    """Runs every variant of every part on the golden records; one report for each variant.

    Args:
        precision: only these variants.
        progress: called after each variant.

    Raises:
        InputError: a part has no golden records.
        UsageError: no part has a variant of that precision.
    """
    todo = bundle.manifest.chosen(precision)
    reports = []
    for part, variant in todo:
        unchecked = (*check_ledger(bundle, variant), *check_quantised_weights(bundle, part, variant))
        name = openvino_label() if is_ir(variant.file) else engine_name
        report = verify_variant(bundle, part, variant, engine_factory(part.name, variant.precision), name)
        reports.append(replace(report, not_run=(*report.not_run, *unchecked)))
        if progress is not None:
            progress(len(reports), len(todo))
    return reports


def verify_variant(
    bundle: OpenBundle, part: PartRecord, variant: VariantRecord, engine: EngineRun, engine_name: str
) -> PartReport:
    """Runs one variant on the golden records; its weights are not looked at.

    Raises:
        InputError: the part has no golden records.
    """
    points = judge_records(
        part,
        variant.precision,
        variant_gate(part.name, variant),
        iterate_golden(bundle, part.name),
        engine,
        engine_name,
        reference=_reference_name(variant),
        floor=_recorded_floor(variant, bundle.manifest.name, part.name),
    )
    if not points.points:
        raise InputError(
            f"the bundle holds no golden records of part {part.name!r}, so nothing can be proved on this machine",
            where=f"golden/{part.name}",
            expected="ONNX standard test data: test_data_set_0/input_0.pb and so on",
            fix="verify it against its checkpoint (--source), or export the model again",
        )
    return replace(points, not_run=_not_run(variant))


def judge_records(
    part: PartRecord,
    precision: str,
    gate: Gate,
    records: Iterable[GoldenRecord],
    engine: EngineRun,
    engine_name: str,
    *,
    reference: str,
    floor: Floor | None = None,
) -> PartReport:
    """Runs a part's graph on golden records.

    Args:
        gate: the limits of that precision.
        reference: who computed them.
        floor: the noise that outputs are judged by as well, where it is known.
    """
    judge = None if floor is None else FloorJudge(floor)
    points: list[PointResult] = []
    for record in records:
        expected, got = (lambda record=record: record.outputs), (lambda record=record: engine(record.inputs))
        points.append(judge_point("golden", part.signature, record.inputs, expected, got, gate, floor=judge))
    return PartReport(part.name, precision, gate, tuple(points), reference, engine_name, floor=floor)


def _recorded_floor(variant: VariantRecord, bundle: str, part: str) -> Floor | None:
    """The floor that the export measured, with room for another machine; None where it measured none."""
    stated = (variant.verification or {}).get("floor")
    where = f"{bundle}: part {part} at {variant.precision}: verification.floor"
    return floor_from_json(stated, where, ELSEWHERE) if isinstance(stated, dict) else None


def _reference_name(variant: VariantRecord) -> str:
    """Who computed the golden outputs, as the manifest says."""
    stated = (variant.verification or {}).get("reference")
    return f"recorded outputs of: {stated}" if isinstance(stated, str) else "recorded outputs"


def _not_run(variant: VariantRecord) -> tuple[str, ...]:
    """What the verification of the export left out, as the manifest says."""
    stated = (variant.verification or {}).get("not_run")
    return tuple(f"at the export: {text}" for text in stated) if isinstance(stated, list) else ()
