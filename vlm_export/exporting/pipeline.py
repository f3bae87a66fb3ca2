"""The main job: SOURCE in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlm_export.bundle import layout
from vlm_export.bundle.environment import check_free_space
from vlm_export.bundle.ledger import GraphLedger, ledger_to_bytes
from vlm_export.bundle.manifest import Manifest, PartRecord, VariantRecord
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.publish import Staging, publication
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import VerificationError, VlmExportError
from vlm_export.exporting.backends import Exporter, choose_exporter, choose_lowerings, export_part
from vlm_export.exporting.bundle_manifest import check_publishable, manifest_from_model, with_contract
from vlm_export.exporting.contract import prove_contract, sides_of
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.fp16_ranges import measure_wide, wide_warning
from vlm_export.exporting.ledger import account_for, folded_sources
from vlm_export.exporting.options import FP32, ExportOptions, Precision
from vlm_export.exporting.original_runs import Original, original_beside
from vlm_export.exporting.parts import check_images, needed_bytes, planned_parts
from vlm_export.exporting.source import build_model, recognise_source
from vlm_export.exporting.stages import StageRecord, Stages
from vlm_export.exporting.tokenizers.files import model_with_tokenizer, resolve_tokenizer
from vlm_export.exporting.verification import (
    PartVerification,
    part_samples,
    prove_variant,
    variant_label,
)
from vlm_export.family import Checkpoint, Model, Reference
from vlm_export.precision.fp16 import convert_to_fp16, rounded_from
from vlm_export.proof.contract import ContractReport
from vlm_export.proof.engine import verifying_engine
from vlm_export.proof.golden import golden_from_reference, write_golden
from vlm_export.proof.image_samples import takes_images
from vlm_export.proof.points import EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.runtime.inputs.images import open_image
from vlm_export.specs import ImageSpec, PatchSpec

_SCRATCH = "scratch"


@dataclass(frozen=True)
class ExportResult:
    """A published bundle.

    Attributes:
        manifest: all that the bundle says about itself.
        reports: the verification of all variants, in the order of the parts.
        contract: the proof from images and texts to vectors.
        stages: what each stage took.
    """

    manifest: Manifest
    reports: tuple[PartReport, ...]
    contract: ContractReport
    stages: tuple[StageRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """What `export --json` prints, but for the bundle's path."""
        return {
            "verification": [report.to_json() for report in self.reports],
            "contract": self.contract.to_json(),
            "stages": [
                {"name": r.name, "seconds": round(r.seconds, 4), "peak_anonymous_bytes": r.peak_anonymous_bytes}
                for r in self.stages
            ],
            "manifest": self.manifest.to_json(),
        }


def export_bundle(source: str, target: Path, options: ExportOptions, stages: Stages | None = None) -> ExportResult:
    """Exports a checkpoint and publishes the bundle at `target`, if every part passes verification.

    Args:
        source: a file, a directory, a name from `configs/`, or a hub id.
        stages: told of each stage; its records hold times and peak memory.

    Raises:
        VerificationError: a graph does not compute what the original computes; nothing is published.
        UsageError, InputError, EnvironmentFailure: see `open_checkpoint` and `publication`.
    """
    exporter, stages = choose_exporter(options.opset, options.exporter), stages or Stages()
    with publication(target, overwrite=options.overwrite) as staging:
        scratch = staging.path / _SCRATCH
        scratch.mkdir()
        with stages.stage("read") as progress:
            for path in options.images:
                open_image(path)
            opened = recognise_source(source, options, scratch, progress)
            family, checkpoint = opened.family, opened.checkpoint
            parts = planned_parts(family, checkpoint, options.parts, options.with_preprocessing)
            check_images(parts, options.images)
            check_free_space(staging.path, needed_bytes(family, checkpoint, parts, options.precisions))
        with ScratchStore(scratch / "weights.bin") as store:
            with stages.stage("load weights"):
                model = build_model(opened, store, options)
                check_publishable(target.name, checkpoint, model, opened.known, options)
                model, tokenizer = _write_tokenizer(checkpoint, model, options, staging)
                _check_prepared_images(model, options.images)
                verifications = [
                    PartVerification(part, model, opened.known, part_samples(part, model, tokenizer, options.images))
                    for part in model.parts
                ]
            sides = sides_of(checkpoint, options.tokenizer, with_texts=tokenizer is not None)
            with original_beside(model, verifications, sides, options.precisions) as original:
                job = _Job(options, exporter, stages, staging, original)
                # All graphs before any verification: a back end's failure shows early, and engines leave memory behind.
                proved = [job.verify(graph) for graph in [job.export(each) for each in verifications]]
                records = tuple(part.record for part in proved)
                _write_configs(model, records, staging)
                manifest = manifest_from_model(target.name, checkpoint, model, opened.known, records, options)
                contract = job.prove_contract(manifest, {each.part.name: each.weights_bytes for each in verifications})
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()
        with stages.stage("publish"):
            checkpoint.check_unchanged()
            ledgers = [ledger for part in proved for ledger in part.ledgers]
            staging.file(layout.LEDGER_NAME).write_bytes(ledger_to_bytes(ledgers))
            manifest = staging.commit(with_contract(manifest, contract))
    reports = tuple(report for part in proved for report in part.reports)
    return ExportResult(manifest, reports, contract, tuple(stages.records))


@dataclass(frozen=True)
class _Written:
    """A variant's graph as it lies on disk.

    Attributes:
        computed: from `folded_sources`.
        constants: what initializers held before they were rounded, from `rounded_from`.
    """

    precision: Precision
    paths: list[Path]
    computed: Mapping[str, Sequence[str]]
    constants: Mapping[str, ir.TensorProtocol]
    simplified: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Exported:
    """A part's written graphs, and the back end's own graph in case a simplified one turns out to differ."""

    verification: PartVerification
    raw: ir.Model
    variants: tuple[_Written, ...]


@dataclass(frozen=True)
class _Proved:
    """What the manifest, the report and the ledger say of a part."""

    record: PartRecord
    reports: tuple[PartReport, ...]
    ledgers: tuple[GraphLedger, ...]


@dataclass(frozen=True)
class _Job:
    """An export after its model is built: what each of its parts goes through."""

    options: ExportOptions
    exporter: Exporter
    stages: Stages
    staging: Staging
    original: Original

    def export(self, verification: PartVerification) -> _Exported:
        """The part's graphs of all precisions, written."""
        part, warnings = verification.part, list[str]()
        with self.stages.stage(f"export {part.name}"):
            raw = export_part(part, self.options.opset, self.exporter, choose_lowerings(self.options.target))
        simplified: ir.Model | None = None
        if self.options.simplify:
            with self.stages.stage(f"simplify {part.name}"):
                try:
                    simplified = finish_graph(simplify_graph(raw), part.signature)
                except (RuntimeError, ValueError, VerificationError) as error:
                    warnings.append(f"simplification failed, so the graph is not simplified: {error}")
        raw = finish_graph(raw, part.signature)
        variants = tuple(
            self._write(simplified or raw, verification, precision, warnings, simplified=simplified is not None)
            for precision in self.options.precisions
        )
        return _Exported(verification, raw, variants)

    def _write(
        self,
        graph: ir.Model,
        verification: PartVerification,
        precision: Precision,
        warnings: Sequence[str],
        *,
        simplified: bool,
    ) -> _Written:
        part, wide = verification.part, None
        if precision != FP32:
            with self.stages.stage(f"measure {part.name}"):
                wide = measure_wide(graph, verification, self.staging.path / _SCRATCH, self.options.threads)
            warnings = [*warnings, *wide_warning(wide)]
        with self.stages.stage(f"write {variant_label(part, precision)}"):
            path = self.staging.file(layout.graph_path(part.name, precision))
            computed = folded_sources(graph)
            if precision != FP32:
                graph = convert_to_fp16(graph, wide or ())
            with _own_errors():
                paths = write_graph(graph, path, self.options.external_data_threshold_bytes)
            return _Written(precision, paths, computed, rounded_from(graph), simplified, tuple(warnings))

    def verify(self, exported: _Exported) -> _Proved:
        """Proves the part's variants, accounts for their weights and records golden inputs and outputs."""
        verification = exported.verification
        part = verification.part
        with self.stages.stage(f"load reference of {part.name}"):
            reference = self.original.reference(part.name)
        results = [
            self._verify_variant(written, exported.raw, verification, reference) for written in exported.variants
        ]
        with self.stages.stage(f"record golden of {part.name}"):
            records = golden_from_reference(part, reference, verification.golden_points(), verification.samples[:1])
            write_golden(self.staging.path, part.name, records)
        variants = tuple(self._record(written, report) for written, report in results)
        ledgers = tuple(
            account_for(part, self.staging.path, variant.file, written.computed, written.constants)
            for variant, (written, _) in zip(variants, results, strict=True)
        )
        return _Proved(PartRecord(part.name, part.signature, variants), tuple(r for _, r in results), ledgers)

    def _verify_variant(
        self, written: _Written, raw: ir.Model, verification: PartVerification, reference: Reference
    ) -> tuple[_Written, PartReport]:
        """The variant as it is published and its report; from the raw graph if the simplified one fails."""
        report = self._compare(written, verification, reference)
        if written.simplified and not report.passed:
            why = f"the simplified graph differs, so this one is not simplified: {report.first_failure()}"
            for path in written.paths:
                path.unlink()
            written = self._write(raw, verification, written.precision, [why], simplified=False)
            report = self._compare(written, verification, reference)
        try:
            report.raise_if_failed()
        except VerificationError as error:
            if written.precision != FP32 and report.failures:
                error.fix = "this part does not work in float16; export without --precision fp16"
            raise
        return written, report

    def _compare(self, written: _Written, verification: PartVerification, reference: Reference) -> PartReport:
        with self.stages.stage(f"verify {variant_label(verification.part, written.precision)}") as progress:
            return prove_variant(
                verification,
                reference,
                written.precision,
                written.paths[0],
                progress,
                constants=lambda _: written.constants,
                scratch=self.staging.path / _SCRATCH,
                threads=self.options.threads,
                for_export=True,
            )

    def prove_contract(self, manifest: Manifest, sizes: Mapping[str, int]) -> ContractReport:
        """The proof from images and texts to vectors, on the staged files; raises where it fails.

        Args:
            sizes: part name → bytes of its weights.
        """

        def start(part: str, precision: str) -> EngineRun:
            path = self.staging.path / manifest.part(part).variant(precision).file
            return verifying_engine(path, weights_bytes=sizes[part], threads=self.options.threads).run

        with self.stages.stage("prove contract"):
            report = prove_contract(self.staging.path, manifest, self.original, start)
            report.raise_if_failed()
        return report

    def _record(self, written: _Written, report: PartReport) -> VariantRecord:
        names = [path.relative_to(self.staging.path).as_posix() for path in written.paths]
        return VariantRecord(
            precision=written.precision,
            file=names[0],
            external_data=tuple(names[1:]),
            opset=self.options.opset,
            exporter=self.exporter,
            simplified=written.simplified,
            oldest_onnxruntime=oldest_onnxruntime(written.paths[0])[0],
            warnings=written.warnings,
            verification=report.to_json(),
        )


def _check_prepared_images(model: Model, images: Sequence[Path]) -> None:
    """InputError where the model's preparation refuses one of the user's images, before minutes are spent."""
    if images:
        part = next(part for part in model.parts if takes_images(part.signature))
        part_samples(part, model, None, images)


def _write_tokenizer(
    checkpoint: Checkpoint, model: Model, options: ExportOptions, staging: Staging
) -> tuple[Model, Path | None]:
    """The model with what its tokenizer says, and the bundle's tokenizer.json, where there is one."""
    only_images = all(takes_images(part.signature) for part in model.parts) and options.tokenizer is None
    if model.text is None or not options.with_tokenizer or only_images:
        return model, None
    found = resolve_tokenizer(checkpoint, options.tokenizer, model.text, reserved_rows=model.reserved_rows)
    for name, content in found.files.items():
        staging.file(name).write_bytes(content)
    return model_with_tokenizer(model, found), staging.path / layout.TOKENIZER_NAME


@contextmanager
def _own_errors() -> Iterator[None]:
    """An error of this project's that a tensor raised while it was written, without what onnx_ir wraps around it."""
    try:
        yield
    except ir.serde.SerdeError as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, VlmExportError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _write_configs(model: Model, records: tuple[PartRecord, ...], staging: Staging) -> None:
    variants = [variant for record in records for variant in record.variants]
    files: dict[str, Mapping[str, Any]] = {layout.CONFIG_NAME: layout.hub_config(model.hub_config, variants)}
    if isinstance(model.image, ImageSpec | PatchSpec):
        files[layout.PREPROCESSOR_NAME] = layout.preprocessor_config(model.image)
    for name, data in files.items():
        staging.file(name).write_bytes(layout.json_bytes(data))
