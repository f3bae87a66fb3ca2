"""A published bundle against the checkpoint that it was made from, over the whole grid again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm_export.bundle import layout
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError
from vlm_export.export.options import ExportOptions
from vlm_export.export.parts import select_parts
from vlm_export.export.preprocessing_part import PART_NAME, add_preprocessing
from vlm_export.export.source import adapt_model, known_checkpoint, open_source
from vlm_export.export.stages import Stages
from vlm_export.export.verification import PRECISION, PartVerification, engine_label
from vlm_export.family import BuildOptions, Checkpoint, Part
from vlm_export.models.registry import recognise
from vlm_export.runtime.engine import OrtEngine
from vlm_export.specs import record_from_json
from vlm_export.verify.report import PartReport
from vlm_export.verify.samples import sample_inputs


def verify_against_source(
    bundle: OpenBundle, source: str, providers: Sequence[str], threads: int | None, stages: Stages
) -> list[PartReport]:
    """One report for each part; the Reference is built from `source` again.

    Raises:
        InputError: the source's files are not those that the manifest records.
    """
    options = ExportOptions(random_weights_seed=bundle.manifest.source.random_weights_seed)
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        with stages.stage("read") as progress:
            checkpoint = open_source(source, options, Path(folder), progress)
            _check_same_source(checkpoint, bundle.manifest)
        with ScratchStore(Path(folder) / "weights.bin") as store:
            with stages.stage("load weights"):
                known = known_checkpoint(source)
                build = record_from_json(BuildOptions, bundle.manifest.facts.get("build", {}))
                model = recognise(checkpoint).build(checkpoint, store, build)
                model = adapt_model(model, checkpoint, known, build)
                if PART_NAME in {part.name for part in bundle.manifest.parts}:
                    model = add_preprocessing(model)
            reports = []
            for part in select_parts(model, [part.name for part in bundle.manifest.parts]).parts:
                samples = sample_inputs(part.signature, model.image, model.text, _tokenizer(bundle))
                with stages.stage(f"verify {part.name}") as progress:
                    engine = OrtEngine(_graph(bundle, part), providers=providers, threads=threads, exact=True)
                    verification = PartVerification(part, model, known, samples)
                    reference = model.references[part.name]()
                    reports.append(verification.run(engine.run, engine_label(providers), reference, progress))
    return reports


def _graph(bundle: OpenBundle, part: Part) -> Path:
    return bundle.model_files(bundle.manifest.part(part.name).variant(PRECISION))


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
