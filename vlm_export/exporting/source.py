"""What the user names as SOURCE, made a Checkpoint: read from disk, or random weights of a known architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_export.bundle.manifest import SourceFile, SourceRecord
from vlm_export.checkpoint.names import hidden_name
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.sources.known import KnownCheckpoint, is_pinned, known_names, load_known, packaged_path
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.parts import add_preprocessing, select_parts
from vlm_export.exporting.stages import StepProgress
from vlm_export.family import BuildOptions, Checkpoint, Family, Model, WeightStore
from vlm_export.models.reading.image_processor import IMAGE_SIZE_OPTION, assumed_preparation, with_image_size
from vlm_export.models.recognition.claims import left_out_warnings
from vlm_export.models.registry import identify, load_family, read_prefixes
from vlm_export.specs import ImageSpec, Origins
from vlm_export.specs.codec import field_words


def known_checkpoint(source: str) -> KnownCheckpoint | None:
    """The config of that name, unless a file or directory has it."""
    return load_known(source) if source in known_names() and not Path(source).exists() else None


def open_source(source: str, options: ExportOptions, scratch: Path, progress: StepProgress) -> Checkpoint:
    """Opens SOURCE; with `random_weights_seed`, writes random weights of a known architecture into `scratch`."""
    if options.random_weights_seed is None:
        return open_checkpoint(
            source,
            base=options.base,
            expected_sha256=options.sha256,
            revision=options.revision,
            progress=lambda _, done, total: progress(done, total),
            reads=read_prefixes,
        )
    known = known_checkpoint(source)
    if known is None:
        raise UsageError(
            "random weights need a known architecture",
            where=source,
            expected="a name from configs/",
            fix=hidden_name(source) or suggestion(source, known_names()),
        )
    family = load_family(known.family)
    checkpoint = random_checkpoint(
        source,
        family.published_tensors(known.architecture),
        options.random_weights_seed,
        scratch / "random.safetensors",
        family.published_config(known.architecture),
    )
    side_files = {"tokenizer.json": packaged_path(known.tokenizer)} if known.tokenizer else {}
    return replace(checkpoint, side_files=side_files)


@dataclass(frozen=True)
class RecognisedSource:
    """A checkpoint, and who computes it.

    Attributes:
        known: our config of the name that the user gave, None for any other source.
    """

    family: Family
    checkpoint: Checkpoint
    known: KnownCheckpoint | None


def recognise_source(
    source: str,
    options: ExportOptions,
    scratch: Path,
    progress: StepProgress,
    recorded: Sequence[SourceFile] | None = None,
) -> RecognisedSource:
    """Opens SOURCE and finds its family; with `recorded`, InputError unless its files are those of the manifest."""
    checkpoint = open_source(source, options, scratch, progress)
    if recorded is not None:
        _check_same_files(checkpoint, recorded)
    return RecognisedSource(*identify(checkpoint), known_checkpoint(source))


def build_model(opened: RecognisedSource, store: WeightStore, options: ExportOptions) -> Model:
    """The parts that are exported, with what our configs state: how inputs are prepared, and that nothing is assumed.

    Raises:
        UsageError: the options say what the checkpoint says itself, or name a part that the model lacks.
    """
    checkpoint, build = opened.checkpoint, options.build
    _check_family_options(opened.family, checkpoint, build)
    model = adapt_model(opened.family.build(checkpoint, store, build), checkpoint, opened.known, build)
    assumed = () if is_pinned(checkpoint.files) else model.warnings
    model = replace(
        model,
        warnings=(*assumed, *assumed_preparation(checkpoint, model.origins), *left_out_warnings(checkpoint)),
        notes=checkpoint.notes,
        dropped_keys=(*model.dropped_keys, *checkpoint.left_out),
    )
    return select_parts(add_preprocessing(model) if options.with_preprocessing else model, options.parts)


def adapt_model(model: Model, checkpoint: Checkpoint, known: KnownCheckpoint | None, build: BuildOptions) -> Model:
    """The model with what our config states about preparing inputs, unless the checkpoint brings a config itself."""
    brings_config = checkpoint.config is not None or bool(checkpoint.side_configs)
    if known is None or (brings_config and checkpoint.format != "random"):
        return model
    image = known.image or model.image
    if isinstance(image, ImageSpec) and build.image_size is not None:
        image = with_image_size(image, build.image_size)
    origins = model.origins | known.origins
    if build.image_size is not None:
        origins |= Origins(dict.fromkeys(("image.size_pixels", "image.resize_pixels"), IMAGE_SIZE_OPTION))
    return replace(model, image=image, text=known.text or model.text, origins=origins)


def source_record(checkpoint: Checkpoint, options: ExportOptions) -> SourceRecord:
    """Where the weights come from; of a path only the last component, since the rest tells of this machine."""
    path = Path(checkpoint.source)
    return SourceRecord(
        name=path.resolve().name if path.exists() else checkpoint.source,
        format=checkpoint.format,
        revision=checkpoint.revision,
        random_weights_seed=options.random_weights_seed,
        files=tuple(SourceFile(file.name, file.size_bytes, file.sha256) for file in checkpoint.files),
        shards_left_aside=checkpoint.shards_left_aside,
    )


def _check_family_options(family: Family, checkpoint: Checkpoint, build: BuildOptions) -> None:
    """UsageError for options that the family does not have, or that a known checkpoint answers itself."""
    if not build.family_options:
        return
    given = ", ".join(f"{name}={value}" for name, value in build.family_options.items())
    words = " and ".join(f"{name} ({allowed})" for name, allowed in field_words(family.options).items())
    if is_pinned(checkpoint.files) or not words:
        raise UsageError(
            "--set is for weights that nothing else describes",
            where=checkpoint.source,
            expected="no such option",
            got=f"{given} for {'the family ' + family.name if not words else 'a known checkpoint'}",
            fix="leave these options out",
        )
    try:
        family.options.from_config(build.family_options, "--set")
    except InputError as error:
        raise UsageError(
            f"the family {family.name!r} has no such option or value",
            where="--set",
            expected=words,
            got=given,
            fix=error.fix or "leave these options out",
        ) from error


def _check_same_files(checkpoint: Checkpoint, recorded: Sequence[SourceFile]) -> None:
    """InputError that names the files where the checkpoint is not the one that a manifest records."""
    expected = {file.sha256: file.name for file in recorded}
    found = {file.sha256: file.name for file in checkpoint.files}
    if expected.keys() != found.keys():
        raise InputError(
            "the source is not the checkpoint that this bundle was made from",
            where=checkpoint.source,
            expected=_files_text(expected, found),
            got=_files_text(found, expected),
            fix="name the checkpoint that the manifest records under source",
        )


def _files_text(files: Mapping[str, str], others: Mapping[str, str]) -> str:
    """The names of files by sha256 that are not among the others, with the beginning of their digests."""
    texts = sorted(f"{name} of sha256 {sha256[:12]}…" for sha256, name in files.items() if sha256 not in others)
    return ", ".join(texts) or "no other file"
