"""The main job: SOURCE in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlm_export.bundle import layout
from vlm_export.bundle.environment import check_free_space
from vlm_export.bundle.ledger import GraphLedger, ledger_to_bytes
from vlm_export.bundle.manifest import Manifest, PartRecord, VariantRecord
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.publish import Staging, publication
from vlm_export.checkpoint.sources.known import KnownCheckpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import VerificationError, VlmExportError
from vlm_export.exporting.backends import Exporter, choose_exporter, choose_lowerings, export_part
from vlm_export.exporting.bundle_manifest import check_publishable, manifest_from_model, with_contract
from vlm_export.exporting.contract import prove_contract, sides_of
from vlm_export.exporting.fp16_proof import rounded_points, unrounded_report
from vlm_export.exporting.ledger import account_for, folded_sources
from vlm_export.exporting.options import FP32, ExportOptions, Precision
from vlm_export.exporting.originals import quiet_transformers
from vlm_export.exporting.parts import check_images, needed_bytes, planned_parts, select_parts
from vlm_export.exporting.preprocessing_part import add_preprocessing
from vlm_export.exporting.published_files import json_bytes
from vlm_export.exporting.simplify import finish_graph, simplify_graph
from vlm_export.exporting.source import build_model, known_checkpoint, open_source
from vlm_export.exporting.stages import StageRecord, Stages
from vlm_export.exporting.tokenizers.files import model_with_tokenizer, resolve_tokenizer
from vlm_export.exporting.verification import (
    PartVerification,
    engine_label,
    part_samples,
    variant_label,
    verifying_engine,
    weights_bytes,
)
from vlm_export.exporting.writer import write_graph
from vlm_export.family import Checkpoint, Model, Part, Reference
from vlm_export.models.registry import identify
from vlm_export.precision.fp16 import convert_to_fp16, rounded_from
from vlm_export.proof.contract import ContractReport
from vlm_export.proof.golden import golden_from_reference, write_golden
from vlm_export.proof.image_samples import takes_images
from vlm_export.proof.points import EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import CPU, OrtEngine
from vlm_export.runtime.inputs.images import open_image
from vlm_export.specs import ImageSpec

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
    job = _Job(source, options, choose_exporter(options.opset, options.exporter), stages or Stages())
    with publication(target, overwrite=options.overwrite) as staging:
        return job.run(staging, name=target.name)


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

    part: Part
    raw: ir.Model
    variants: tuple[_Written, ...]


@dataclass(frozen=True)
class _Job:
    source: str
    options: ExportOptions
    exporter: Exporter
    stages: Stages

    def run(self, staging: Staging, name: str) -> ExportResult:
        scratch = staging.path / _SCRATCH
        scratch.mkdir()
        known = known_checkpoint(self.source)
        with self.stages.stage("read") as progress:
            for path in self.options.images:
                open_image(path)
            checkpoint = open_source(self.source, self.options, scratch, progress)
            family, checkpoint = identify(checkpoint)
            parts = planned_parts(family, checkpoint, self.options.parts, self.options.with_preprocessing)
            check_images(parts, self.options.images)
            check_free_space(staging.path, needed_bytes(family, checkpoint, parts, self.options.precisions))
        with ScratchStore(scratch / "weights.bin") as store:
            with self.stages.stage("load weights"):
                model = build_model(family, checkpoint, known, store, self.options.build)
                if self.options.with_preprocessing:
                    model = add_preprocessing(model)
                model = select_parts(model, self.options.parts)
                check_publishable(name, checkpoint, model, known, self.options)
                model, tokenizer = self._write_tokenizer(checkpoint, model, staging)
                self._check_images(model)
            # All graphs before any verification: a back end's failure shows early, and engines leave memory behind.
            exported = [self._export(part, staging) for part in model.parts]
            results = [self._verify(graph, model, known, staging, tokenizer) for graph in exported]
            records = tuple(record for record, _, _ in results)
            _write_configs(model, records, staging)
            manifest = manifest_from_model(name, checkpoint, model, known, records, self.options)
            contract = self._prove_contract(staging, manifest, model, checkpoint, tokenizer)
        _remove_scratch(scratch)
        with self.stages.stage("publish"):
            checkpoint.check_unchanged()
            ledger = ledger_to_bytes([graph for _, _, graphs in results for graph in graphs])
            staging.file(layout.LEDGER_NAME).write_bytes(ledger)
            manifest = staging.commit(with_contract(manifest, contract))
        reports = tuple(report for _, reports, _ in results for report in reports)
        return ExportResult(manifest, reports, contract, tuple(self.stages.records))

    def _export(self, part: Part, staging: Staging) -> _Exported:
        warnings: list[str] = []
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
        graph, is_simplified = simplified or raw, simplified is not None
        variants = tuple(
            _Written(precision, *self._write(graph, part, precision, staging), is_simplified, tuple(warnings))
            for precision in self.options.precisions
        )
        return _Exported(part, raw, variants)

    def _write(
        self, graph: ir.Model, part: Part, precision: Precision, staging: Staging
    ) -> tuple[list[Path], Mapping[str, Sequence[str]], Mapping[str, ir.TensorProtocol]]:
        """What `_Written` holds of a graph's paths and weights."""
        with self.stages.stage(f"write {variant_label(part, precision)}"):
            path = staging.file(layout.graph_path(part.name, precision))
            computed = folded_sources(graph)
            if precision != FP32:
                graph = convert_to_fp16(graph)
            with _own_errors():
                paths = write_graph(graph, path, self.options.external_data_threshold_bytes)
            return paths, computed, rounded_from(graph)

    def _verify(
        self, exported: _Exported, model: Model, known: KnownCheckpoint | None, staging: Staging, tokenizer: Path | None
    ) -> tuple[PartRecord, tuple[PartReport, ...], tuple[GraphLedger, ...]]:
        part = exported.part
        verification = PartVerification(part, model, known, part_samples(part, model, tokenizer, self.options.images))
        with self.stages.stage(f"load reference of {part.name}"), quiet_transformers():
            reference = verification.load_reference()
        results = [
            self._verify_variant(written, exported.raw, verification, reference, staging)
            for written in exported.variants
        ]
        with self.stages.stage(f"record golden of {part.name}"):
            records = golden_from_reference(part, reference, verification.golden_points(), verification.samples[:1])
            write_golden(staging.path, part.name, records)
        variants = tuple(self._variant(written, staging, report) for written, report in results)
        ledgers = tuple(_ledger(written, part, staging) for written, _ in results)
        return PartRecord(part.name, part.signature, variants), tuple(report for _, report in results), ledgers

    def _verify_variant(
        self, written: _Written, raw: ir.Model, verification: PartVerification, reference: Reference, staging: Staging
    ) -> tuple[_Written, PartReport]:
        """The variant as it is published and its report; from the raw graph if the simplified one fails."""
        report = self._compare(written, verification, reference, staging)
        if written.simplified and not report.passed:
            why = f"the simplified graph differs, so this one is not simplified: {report.first_failure()}"
            for path in written.paths:
                path.unlink()
            made = self._write(raw, verification.part, written.precision, staging)
            written = _Written(written.precision, *made, False, (*written.warnings, why))
            report = self._compare(written, verification, reference, staging)
        _raise_if_failed(report, written.precision)
        return written, report

    def _compare(
        self, written: _Written, verification: PartVerification, reference: Reference, staging: Staging
    ) -> PartReport:
        path, precision = written.paths[0], written.precision
        with self.stages.stage(f"verify {variant_label(verification.part, precision)}") as progress:
            start = partial(self._start_engine, verification.weights_bytes)
            engine = start(path)
            label, mapped = engine_label((CPU,), mapped=engine.mapped), engine.mapped
            floor = verification.floor(reference, precision)
            report = verification.run(engine.run, label, reference, progress, precision, mapped=mapped, floor=floor)
            if precision == FP32 or not report.passed:
                return report
            del engine  # The weights of one engine at a time.
            rounded = rounded_points(path, start, verification, reference, floor)
            noise = report.floor if floor is None else floor.floor
            report = replace(report, points=(*report.points, *rounded), floor=noise)
            scratch = staging.path / _SCRATCH
            found = unrounded_report(
                path, start, verification, reference, lambda _: written.constants, engine_name=label, scratch=scratch
            )
            return report.with_unrounded(found)

    def _start_engine(self, weights_bytes: int, path: Path) -> OrtEngine:
        """`weights_bytes`: in float32, which the CPU makes of float16 ones."""
        return verifying_engine(path, weights_bytes=weights_bytes, threads=self.options.threads)

    def _prove_contract(
        self, staging: Staging, manifest: Manifest, model: Model, checkpoint: Checkpoint, tokenizer: Path | None
    ) -> ContractReport:
        sides = sides_of(checkpoint, self.options.tokenizer, with_texts=tokenizer is not None)

        def start(part: str, precision: str) -> EngineRun:
            variant = manifest.part(part).variant(precision)
            size = next(map(weights_bytes, (p for p in model.parts if p.name == part)))
            return self._start_engine(size, staging.path / variant.file).run

        with self.stages.stage("prove contract"):
            report = prove_contract(staging.path, manifest, model, sides, start)
            report.raise_if_failed()
        return report

    def _variant(self, written: _Written, staging: Staging, report: PartReport) -> VariantRecord:
        names = [path.relative_to(staging.path).as_posix() for path in written.paths]
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

    def _check_images(self, model: Model) -> None:
        """InputError where the model's preparation refuses one of the user's images, before minutes are spent."""
        if self.options.images:
            part = next(part for part in model.parts if takes_images(part.signature))
            part_samples(part, model, None, self.options.images)

    def _write_tokenizer(self, checkpoint: Checkpoint, model: Model, staging: Staging) -> tuple[Model, Path | None]:
        """The model with what its tokenizer says, and the bundle's tokenizer.json, where there is one."""
        only_images = all(takes_images(part.signature) for part in model.parts) and self.options.tokenizer is None
        if model.text is None or not self.options.with_tokenizer or only_images:
            return model, None
        found = resolve_tokenizer(checkpoint, self.options.tokenizer, model.text, reserved_rows=model.reserved_rows)
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


def _ledger(written: _Written, part: Part, staging: Staging) -> GraphLedger:
    """The ledger of the graph that is published, after comparing its weights with the checkpoint's."""
    name = written.paths[0].relative_to(staging.path).as_posix()
    return account_for(part, staging.path, name, written.computed, written.constants)


def _raise_if_failed(report: PartReport, precision: Precision) -> None:
    try:
        report.raise_if_failed()
    except VerificationError as error:
        if precision != FP32 and report.failures:
            error.fix = "this part does not work in float16; export without --precision fp16"
        raise


def _remove_scratch(scratch: Path) -> None:
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()


def _write_configs(model: Model, records: tuple[PartRecord, ...], staging: Staging) -> None:
    variants = [variant for record in records for variant in record.variants]
    files: dict[str, Mapping[str, Any]] = {layout.CONFIG_NAME: layout.hub_config(model.hub_config, variants)}
    if isinstance(model.image, ImageSpec):
        files[layout.PREPROCESSOR_NAME] = layout.preprocessor_config(model.image)
    for name, data in files.items():
        staging.file(name).write_bytes(json_bytes(data))
