"""A published bundle against the checkpoint that it was made from: its files, what it states, and its graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm_export.bundle import layout
from vlm_export.bundle.ledger import check_ledger, read_ledger
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest, VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.bundle_manifest import planned_manifest
from vlm_export.exporting.contract import repeat_contract, source_tokenizer
from vlm_export.exporting.fp16_proof import NOT_UNROUNDED, unrounded_report
from vlm_export.exporting.ledger import account_for, recorded_constants
from vlm_export.exporting.options import FP16, ExportOptions
from vlm_export.exporting.parts import select_parts
from vlm_export.exporting.preprocessing_part import PART_NAME, add_preprocessing
from vlm_export.exporting.source import build_model, known_checkpoint, open_source
from vlm_export.exporting.stages import Stages, StepProgress
from vlm_export.exporting.verification import PartVerification, part_samples, variant_label
from vlm_export.family import BuildOptions, Checkpoint, Model, Reference
from vlm_export.models.registry import identify
from vlm_export.proof.contract import ContractReport
from vlm_export.proof.declared import check_declared
from vlm_export.proof.engine import engine_label, variant_bytes, verifying_engine
from vlm_export.proof.floor import ELSEWHERE
from vlm_export.proof.points import EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import CPU, OrtEngine


def verify_against_source(
    bundle: OpenBundle,
    source: str,
    providers: Sequence[str],
    threads: int | None,
    stages: Stages,
    precision: str | None = None,
    base: str | None = None,
) -> tuple[list[PartReport], ContractReport]:
    """One report for each variant of each part, over the whole grid, and the contract's, from `source` again.

    Args:
        precision: only these variants.
        base: what a LoRA adapter is put on, None: what its settings name.

    Raises:
        InputError: a file of the bundle is not the one that was exported, the source's files are not those that the
            manifest records, or it states odd options.
        UsageError: a part has no variant of that precision.
        VerificationError: the manifest states another family, architecture, preprocessing, task or signature.
    """
    manifest = bundle.manifest
    bundle.verify(manifest.files)
    options = ExportOptions(
        random_weights_seed=manifest.source.random_weights_seed,
        # Of a Hub id the commit that was exported: its branch may have moved since.
        revision=None if Path(source).exists() else manifest.source.revision,
        base=base,
        build=BuildOptions.from_json(manifest.export.build, f"{bundle.root / MANIFEST_NAME}: export.build"),
    )
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        with stages.stage("read") as progress:
            checkpoint = open_source(source, options, Path(folder), progress)
            _check_same_source(checkpoint, manifest)
        with ScratchStore(Path(folder) / "weights.bin") as store:
            with stages.stage("load weights"):
                known = known_checkpoint(source)
                family, checkpoint = identify(checkpoint)
                model = _rebuilt(bundle, lambda: build_model(family, checkpoint, known, store, options.build))
                if PART_NAME in {part.name for part in manifest.parts}:
                    model = add_preprocessing(model)
                selected = select_parts(model, [part.name for part in manifest.parts])
                model, tokenizer = source_tokenizer(bundle, selected, checkpoint)
                check_declared(bundle, planned_manifest(manifest.name, checkpoint, model, known, options))
            start, reports = partial(_start, bundle, providers, threads), list[PartReport]()
            with stages.stage("prove contract"):
                contract = repeat_contract(bundle, model, checkpoint, tokenizer, start, precision)
            for part in model.parts:
                verification = PartVerification(part, model, known, part_samples(part, model, _tokenizer(bundle)))
                reference = verification.load_reference()
                for variant in manifest.part(part.name).chosen_variants(precision):
                    with stages.stage(f"verify {variant_label(part, variant.precision)}") as progress:
                        account_for(part, bundle.root, variant.file)
                        check_ledger(bundle, variant)
                        report = _report(bundle, verification, reference, variant, providers, threads, progress)
                        if variant.precision == FP16:
                            found = _unrounded(bundle, variant, verification, reference, threads, Path(folder))
                            report = report.with_unrounded(found)
                        reports.append(report)
    return reports, contract


def _rebuilt(bundle: OpenBundle, build: Callable[[], Model]) -> Model:
    """The model; InputError for what the manifest says of the options, since its user has chosen none of them."""
    try:
        return build()
    except UsageError as error:
        raise InputError(
            f"the manifest states options that its source does not take: {error.what}",
            where=f"{bundle.root / MANIFEST_NAME}: export.build",
            expected=error.expected,
            got=error.got,
            fix="do not use this bundle; export the model again",
        ) from error


def _report(
    bundle: OpenBundle,
    verification: PartVerification,
    reference: Reference,
    variant: VariantRecord,
    providers: Sequence[str],
    threads: int | None,
    progress: StepProgress,
) -> PartReport:
    """The variant's own engine against the Reference; closed at the end, for one holds weights at a time."""
    engine = _engine(bundle, variant, providers, threads)
    floor = verification.floor(reference, variant.precision)
    if floor is not None and list(providers) != [CPU]:
        floor.floor = replace(floor.floor, allowance=ELSEWHERE)
    label, mapped = engine_label(providers, mapped=engine.mapped), engine.mapped
    return verification.run(engine.run, label, reference, progress, variant.precision, mapped=mapped, floor=floor)


def _unrounded(
    bundle: OpenBundle,
    variant: VariantRecord,
    verification: PartVerification,
    reference: Reference,
    threads: int | None,
    scratch: Path,
) -> PartReport | str:
    """On the CPU, whatever runs the variant itself: what it shows does not depend on the engine."""
    ledger = read_ledger(bundle)
    if ledger is None or variant.file not in ledger:
        return f"{NOT_UNROUNDED}the bundle has no ledger"
    start = partial(verifying_engine, weights_bytes=verification.weights_bytes, threads=threads)
    return unrounded_report(
        bundle.file(variant.file),
        start,
        verification,
        reference,
        partial(recorded_constants, ledger[variant.file]),
        engine_name=engine_label((CPU,)),
        scratch=scratch,
    )


def _start(bundle: OpenBundle, providers: Sequence[str], threads: int | None, part: str, precision: str) -> EngineRun:
    return _engine(bundle, bundle.manifest.part(part).variant(precision), providers, threads).run


def _engine(bundle: OpenBundle, variant: VariantRecord, providers: Sequence[str], threads: int | None) -> OrtEngine:
    size = variant_bytes(bundle.manifest, variant)
    return verifying_engine(bundle.model_files(variant), weights_bytes=size, threads=threads, providers=providers)


def _tokenizer(bundle: OpenBundle) -> Path | None:
    name = layout.TOKENIZER_NAME
    return bundle.file(name) if name in bundle.manifest.files else None


def _check_same_source(checkpoint: Checkpoint, manifest: Manifest) -> None:
    recorded = {file.sha256 for file in manifest.source.files}
    found = {file.sha256 for file in checkpoint.files}
    if recorded != found:
        raise InputError(
            "the source is not the checkpoint that this bundle was made from",
            where=checkpoint.source,
            expected=", ".join(sorted(sha256[:12] for sha256 in recorded)),
            got=", ".join(sorted(sha256[:12] for sha256 in found)),
            fix="name the checkpoint that the manifest records under source",
        )
