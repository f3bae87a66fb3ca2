"""What the export recorded of its proof, read from a manifest: foreign data, of which only what fits is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_export.bundle.manifest import Manifest, VariantRecord
from vlm_export.errors import VerificationError
from vlm_export.lab.report.findings import OutputProof, Proof, StageProof

_AGAIN = "export the model again"


def recorded_proof(manifest: Manifest, precision: str | None = None) -> Proof:
    """The proof that the manifest states; what it does not state is a problem of it."""
    outputs, problems, not_run, references = list[OutputProof](), list[VerificationError](), list[str](), list[str]()
    for part in manifest.parts:
        for variant in part.chosen_variants(precision):
            data = _mapping(variant.verification)
            found = list(_outputs(part.name, variant.precision, data))
            outputs += found
            not_run += [f"{part.name} {variant.precision}: {text}" for text in _texts(data.get("not_run"))]
            references += _texts([data.get("reference")])
            if not found or data.get("passed") is not True:
                problems.append(_unproved(part.name, variant, data))
    contract = _mapping(manifest.export.contract)
    stages = tuple(_stages(contract))
    problems += [
        VerificationError(f"the export recorded a failure at the stage {stage.stage!r}", where=stage.where, fix=_AGAIN)
        for stage in stages
        if not stage.passed
    ]
    not_run += [f"contract: {text}" for text in _texts(contract.get("not_run"))]
    made_by = {str(key): str(value) for key, value in _mapping(contract.get("made_by")).items()}
    by = f"recorded by the export, against: {', '.join(dict.fromkeys(references)) or 'nobody that it names'}"
    return Proof(by, tuple(outputs), stages, tuple(problems), tuple(not_run), made_by)


def _unproved(part: str, variant: VariantRecord, data: Mapping[str, Any]) -> VerificationError:
    failures = _texts(data.get("failures"))
    return VerificationError(
        f"the manifest records no passed proof of part {part!r} at {variant.precision}",
        where=variant.file,
        got=failures[0] if failures else "no figures" if not data else "not passed",
        fix=_AGAIN,
    )


def _outputs(part: str, variant: str, data: Mapping[str, Any]) -> Iterator[OutputProof]:
    points = sum(count for count in _mapping(data.get("points")).values() if isinstance(count, int))
    noise = _mapping(_mapping(data.get("floor")).get("outputs"))
    failed = 0 if data.get("passed") is True else max(1, _count(data.get("failure_count")))
    for name, worst in _mapping(data.get("worst")).items():
        numbers = _mapping(noise.get(name))
        floor, gate, seen = (_number(_mapping(numbers.get(key)).get("row_error")) for key in ("floor", "gate", "seen"))
        max_abs, cosine = (_number(_mapping(worst).get(key)) for key in ("max_abs", "cosine"))
        yield OutputProof(part, variant, name, points, max_abs, cosine, floor, gate, seen, failed)
    if data.get("unrounded"):
        yield from _outputs(part, f"{variant} unrounded", _mapping(data.get("unrounded")))


def _stages(contract: Mapping[str, Any]) -> Iterator[StageProof]:
    checks = contract.get("checks")
    for check in map(_mapping, checks if isinstance(checks, list | tuple) else ()):
        stage, where, variant = (str(check.get(key, "")) for key in ("stage", "where", "variant"))
        compared, passed = _count(check.get("compared")), check.get("passed") is True
        yield StageProof(stage, where, variant, compared, passed, tuple(_texts(check.get("failures"))))


def _mapping(data: Any) -> Mapping[str, Any]:
    return data if isinstance(data, Mapping) else {}


def _texts(data: Any) -> list[str]:
    return [text for text in data if isinstance(text, str)] if isinstance(data, list | tuple) else []


def _count(data: Any) -> int:
    return data if isinstance(data, int) else 0


def _number(data: Any, unknown: float = math.nan) -> float:
    """A number as `proof.metrics.json_number` writes it."""
    try:
        return float(data) if isinstance(data, int | float | str) else unknown
    except (ValueError, OverflowError):
        return unknown
