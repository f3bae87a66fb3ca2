"""A published bundle against the checkpoint that it was made from: its files, what it declares, and its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from vlm_export.bundle import layout
from vlm_export.bundle.ledger import check_ledger, read_ledger
from vlm_export.bundle.manifest import MANIFEST_NAME, VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.backends import OPSETS, Target
from vlm_export.exporting.bundle_manifest import planned_manifest
from vlm_export.exporting.contract import repeat_contract, source_tokenizer
from vlm_export.exporting.ledger import account_for, recorded_constants
from vlm_export.exporting.options import ExportOptions, Precision
from vlm_export.exporting.parts import PART_NAME
from vlm_export.exporting.source import build_model, recognise_source
from vlm_export.exporting.stages import Stages, StepProgress
from vlm_export.exporting.verification import PartVerification, part_samples, prove_variant, variant_label
from vlm_export.family import BuildOptions, Reference
from vlm_export.proof.contract import ContractReport
from vlm_export.proof.declared import check_declared
from vlm_export.proof.engine import engine_label, verifying_start
from vlm_export.proof.gates import variant_gate
from vlm_export.proof.quantised_weights import check_quantised_weights
from vlm_export.proof.report import PartReport
from vlm_export.proof.verifier import verify_part

NOT_THE_GRID = "the whole grid: a quantised variant is held to its budget at the points of the golden records"


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
            manifest records, or it declares options that its source does not take.
        UsageError: a part has no variant of that precision.
        VerificationError: the manifest declares another family, architecture, preprocessing, task or signature.
    """
    manifest = bundle.manifest
    bundle.verify(manifest.files)
    options = declared_options(bundle, source, base)
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        scratch = Path(folder)
        with stages.stage("read") as progress:
            opened = recognise_source(source, options, scratch, progress, manifest.source.files)
        with ScratchStore(scratch / "weights.bin") as store:
            with stages.stage("load weights"):
                with _declared_option_errors(bundle):
                    model = build_model(opened, store, options)
                model, tokenizer = source_tokenizer(bundle, model, opened.checkpoint)
                check_declared(bundle, planned_manifest(manifest.name, opened.checkpoint, model, opened.known, options))
            with stages.stage("prove contract"):
                start = verifying_start(bundle, providers, threads)
                contract = repeat_contract(bundle, model, opened.checkpoint, tokenizer, start, precision)
            prove = partial(_prove_variant, bundle, providers, threads, stages, scratch)
            reports: list[PartReport] = []
            for part in model.parts:
                name = layout.TOKENIZER_NAME
                sentences = bundle.file(name) if name in manifest.files else None
                verification = PartVerification(part, model, opened.known, part_samples(part, model, sentences))
                with stages.stage(f"load reference of {part.name}"):
                    reference = verification.load_reference()
                variants = manifest.part(part.name).chosen_variants(precision)
                reports += [prove(verification, reference, variant) for variant in variants]
    return reports, contract


def declared_options(bundle: OpenBundle, source: str, base: str | None = None) -> ExportOptions:
    """What the bundle was exported with, so that its source can be exported in the same way again."""
    manifest = bundle.manifest
    parts = [part.name for part in manifest.parts]
    # What has fewer bits was made of the bundle's own float32 graphs, and no export makes it again.
    variants = {v.precision: v for part in manifest.parts for v in part.variants if v.loss is None}
    first = next(iter(variants.values()))
    if first.exporter not in OPSETS and manifest.export.packaged_for is not None:
        raise InputError(
            "a package is not compared with a checkpoint",
            where=str(bundle.root / MANIFEST_NAME),
            got=f"graphs that were made for {manifest.export.packaged_for}",
            fix="verify the bundle that it was made from with --source, and the package without it",
        )
    if first.exporter not in OPSETS:
        raise InputError(
            "the manifest names a back end that there is none of",
            where=str(bundle.root / MANIFEST_NAME),
            expected=" or ".join(OPSETS),
            got=repr(first.exporter),
            fix="do not use this bundle; export the model again",
        )
    return ExportOptions(
        opset=first.opset,
        exporter=first.exporter,
        target=cast("Target | None", manifest.export.target),
        simplify=any(variant.simplified for variant in variants.values()),
        with_tokenizer=layout.TOKENIZER_NAME in manifest.files,
        precisions=cast("list[Precision]", list(variants)),
        random_weights_seed=manifest.source.random_weights_seed,
        # Of a Hub id the commit that was exported: its branch may have moved since.
        revision=None if Path(source).exists() else manifest.source.revision,
        base=base,
        build=BuildOptions.from_json(manifest.export.build, f"{bundle.root / MANIFEST_NAME}: export.build"),
        with_preprocessing=PART_NAME in parts,
        parts=parts,
    )


@contextmanager
def _declared_option_errors(bundle: OpenBundle) -> Iterator[None]:
    """InputError for what the manifest says of the options, since its user has chosen none of them."""
    try:
        yield
    except UsageError as error:
        raise InputError(
            f"the manifest declares options that its source does not take: {error.what}",
            where=f"{bundle.root / MANIFEST_NAME}: export.build",
            expected=error.expected,
            got=error.got,
            fix="do not use this bundle; export the model again",
        ) from error


def _prove_variant(
    bundle: OpenBundle,
    providers: Sequence[str],
    threads: int | None,
    stages: Stages,
    scratch: Path,
    verification: PartVerification,
    reference: Reference,
    variant: VariantRecord,
) -> PartReport:
    """The variant's weights against the checkpoint and the ledger, then its outputs against the Reference's."""
    with stages.stage(f"verify {variant_label(verification.part, variant.precision)}") as progress:
        if variant.loss is not None:
            return _prove_quantised(bundle, providers, threads, verification, reference, variant, progress)
        account_for(verification.part, bundle.root, variant.file)
        check_ledger(bundle, variant)
        ledger = (read_ledger(bundle) or {}).get(variant.file)
        return prove_variant(
            verification,
            reference,
            variant.precision,
            bundle.model_files(variant),
            progress,
            constants="the bundle has no ledger" if ledger is None else partial(recorded_constants, ledger),
            scratch=scratch,
            providers=providers,
            threads=threads,
        )


def _prove_quantised(
    bundle: OpenBundle,
    providers: Sequence[str],
    threads: int | None,
    verification: PartVerification,
    reference: Reference,
    variant: VariantRecord,
    progress: StepProgress,
) -> PartReport:
    """A variant of fewer bits: its weights against the float32 graph's, which the checkpoint's are compared with, and
    its outputs against the original's at the points of the golden records and at the samples, by its budget.

    The grid of float32 is no promise of such a variant: what it loses was measured at these.
    """
    part = bundle.manifest.part(verification.part.name)
    untold = (*check_ledger(bundle, variant), *check_quantised_weights(bundle, part, variant))
    engine = verifying_start(bundle, providers, threads)(part.name, variant.precision)
    return verify_part(
        verification.part,
        reference,
        engine,
        variant_gate(part.name, variant),
        verification.golden_points(),
        verification.samples,
        variant=variant.precision,
        reference_name=verification.model.reference_name,
        engine_name=engine_label(providers),
        progress=progress,
        with_self_checks=False,
        not_run=(NOT_THE_GRID, *untold),
    )
