"""The stage that proves the contract: the original's own processor, tokenizer and model, against the staged bundle."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, get_args

import numpy as np
from PIL import Image

from vlm_export.bundle import layout
from vlm_export.bundle.manifest import FileRecord, Manifest
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.safe_files import record_of_file
from vlm_export.errors import VlmExportError
from vlm_export.exporting.originals import (
    TOKENIZER_FILES,
    ImagePreparation,
    NotRunError,
    TextPreparation,
    image_preparation,
    quiet_transformers,
    text_preparation,
)
from vlm_export.exporting.published_files import ConsumerChecks, check_consumers, check_published
from vlm_export.exporting.tokenizers.files import (
    ResolvedTokenizer,
    model_with_tokenizer,
    resolve_tokenizer,
    tokenizer_sources,
)
from vlm_export.family import Checkpoint, Model, Part
from vlm_export.original import Asked, Original, Written
from vlm_export.proof.contract import (
    NO_RECORD,
    ContractReport,
    StartEngine,
    compare_records,
    encode,
    replay,
)
from vlm_export.proof.contract_inputs import ContractImage, contract_images, contract_texts
from vlm_export.proof.contract_record import (
    ContractRecord,
    ImageRecord,
    TextRecord,
    WordsKind,
    WordsRecord,
    condensed,
    digest,
    levels,
    read_record,
    write_record,
)
from vlm_export.proof.declared import declared
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays
from vlm_export.runtime.inputs.patches import pack_patches, patch_length
from vlm_export.specs import ImageSpec, PatchSpec
from vlm_export.specs.patches import PATCH_INPUTS
from vlm_export.specs.tasks import CaptionSpec, EmbedSpec, ScoreSpec

SEALED_FILES = (
    *(layout.CONFIG_NAME, layout.PREPROCESSOR_NAME, layout.TOKENIZER_NAME, layout.TOKENIZER_CONFIG_NAME),
    "special_tokens_map.json",
)
NO_TOKENIZER = "texts: the bundle has no tokenizer"
FOREIGN_TOKENIZER = "texts with the original: their tokenizer was named with --tokenizer at the export, and is not here"
TOKENIZER_FILES_KEY, OWN_TOKENIZER, NAMED_TOKENIZER = (
    "tokenizer_files",
    "the checkpoint's, or its library's",
    "--tokenizer",
)
_PIXELS, _IDS, _MASK = "pixel_values", "input_ids", "attention_mask"
# Above this a part's vectors are compared for few inputs, above the next for none: each run takes long.
_LARGE_PART_BYTES, _HUGE_PART_BYTES = 1 << 30, 8 << 30
_FEW = 3
_MAX_ERROR_CHARACTERS = 300
_NO_WORDS = "no original of them can be run here; recorded outputs stand in, in the project's tests"
_WORDS_IMAGES = ("reduced.png", "portrait.png", "grey.png")
_WORDS_LENGTH = 8
# Far above what float32 graphs move logits by, far below what trained models leave between two words.
_LEAST_MARGIN = 1e-3


@dataclass(frozen=True)
class Sides:
    """What the record is made of.

    Attributes:
        files: the checkpoint's side files, and the tokenizer's, by name.
        with_texts: False without a tokenizer in the bundle.
        own_tokenizer: the tokenizer is the checkpoint's, not one that the user named.
    """

    files: Mapping[str, Path]
    with_texts: bool
    own_tokenizer: bool = True


@dataclass(frozen=True)
class OriginalSide:
    """The original's record, its image files by name, and its preparations for further comparisons."""

    record: ContractRecord
    contents: Mapping[str, bytes]
    images: ImagePreparation | None
    texts: TextPreparation | None


class ContractOriginal(Protocol):
    """Who makes the record, and reads the bundle's files as other software does."""

    def recorded(self) -> tuple[ContractRecord, Mapping[str, bytes]]:
        """The record of the contract, and its image files by name."""
        ...

    def consumers(self, root: Path, manifest: Manifest) -> ConsumerChecks:
        """The staged bundle's files as other software reads them, after `recorded`."""
        ...


def prove_contract(
    root: Path, manifest: Manifest, original: ContractOriginal, start_engine: StartEngine
) -> ContractReport:
    """Records what the original makes of the contract's inputs under `root`, and replays it there.

    Args:
        root: a staged bundle with its graphs, configs and tokenizer.
        manifest: what will be published, but for `files`.

    Returns:
        The report, which may have failed.
    """
    own, contents = original.recorded()
    sealed = {name: record_of_file(root, name).sha256 for name in SEALED_FILES if (root / name).is_file()}
    record = replace(own, files=sealed, declared=declared(manifest))
    write_record(root, record, contents)
    report = replay(staged_bundle(root, manifest), start_engine, record=record, images=contents)
    checks, measured, not_run = original.consumers(root, manifest)
    return replace(
        report,
        checks=(*report.checks, *checks),
        measured=(*report.measured, *measured),
        not_run=(*report.not_run, *not_run),
    )


def sides_of(checkpoint: Checkpoint, tokenizer: str | None, *, with_texts: bool) -> Sides:
    """The files that the original reads: the checkpoint's, with the tokenizer that the user named instead of its own.

    Args:
        tokenizer: the option of the export.
    """
    files = {name: path for name, path in checkpoint.side_files.items() if name not in TOKENIZER_FILES}
    return Sides({**files, **tokenizer_sources(checkpoint, tokenizer)}, with_texts, own_tokenizer=tokenizer is None)


def source_tokenizer(
    bundle: OpenBundle, model: Model, checkpoint: Checkpoint
) -> tuple[Model, ResolvedTokenizer | None]:
    """The model with what its tokenizer says, and the tokenizer as an export of the source publishes it.

    A tokenizer that was named at the export is not here: the bundle's own files stand in for it.
    """
    if model.text is None or layout.TOKENIZER_NAME not in bundle.manifest.files:
        return model, None
    option = str(bundle.root) if _has_named_tokenizer(bundle) else None
    found = resolve_tokenizer(checkpoint, option, model.text, reserved_rows=model.reserved_rows)
    return model_with_tokenizer(model, found), found


def _has_named_tokenizer(bundle: OpenBundle) -> bool:
    own = read_record(bundle)
    return own is not None and own.made_by.get(TOKENIZER_FILES_KEY) == NAMED_TOKENIZER


def repeat_contract(
    bundle: OpenBundle,
    model: Model,
    checkpoint: Checkpoint,
    tokenizer: ResolvedTokenizer | None,
    start_engine: StartEngine,
    precision: str | None = None,
    original: OriginalSide | None = None,
) -> ContractReport:
    """The contract of a published bundle again, with the original, and its files against those of an export.

    Args:
        tokenizer: from `source_tokenizer`, like the model.
        precision: only these variants.
        original: what `original_side` gave for this checkpoint before, None to run it now.
    """
    own, foreign = read_record(bundle), _has_named_tokenizer(bundle)
    sides = sides_of(checkpoint, None, with_texts=layout.TOKENIZER_NAME in bundle.manifest.files and not foreign)
    with quiet_transformers():
        original = original or original_side(model, sides)
        notes = [FOREIGN_TOKENIZER] if foreign else []
        files, proved = ({}, declared(bundle.manifest)) if own is None else (own.files, own.declared)
        record = replace(original.record, files=files, declared=proved)
        report = replay(bundle, start_engine, record=record, images=original.contents, precision=precision)
        checks, measured, not_run = check_consumers(
            bundle, original.record, original.contents, original.images, original.texts
        )
    published = check_published(bundle, model, None if foreign else tokenizer)
    again = [] if own is None else list(compare_records(own, record))
    left_out = [text for text in report.not_run if not (foreign and text == NO_TOKENIZER)]
    return ContractReport(
        (*published, *report.checks, *checks, *again),
        report.made_by,
        (*left_out, *not_run, *notes, *([NO_RECORD] if own is None else [])),
        (*report.measured, *measured),
    )


def original_side(model: Model, sides: Sides) -> OriginalSide:
    """Runs the original on the contract's images and texts."""
    not_run: list[str] = []
    made_by: dict[str, str] = {}
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        images: ImagePreparation | None = None
        pixels: dict[str, Array] = {}
        contents: dict[str, bytes] = {}
        black: tuple[float, ...] = ()
        white: tuple[float, ...] = ()
        whole = model.image if isinstance(model.image, ImageSpec | PatchSpec) else None
        if whole is None and _parts_with(model, _PIXELS):
            not_run.append("images: cut by the original's own code, recorded outputs of which stand in the tests")
        elif whole is not None and _parts_with(model, _PIXELS):
            with _noted(not_run):
                edge = whole.edge_pixels
                images = image_preparation(model.original, sides.files, Path(folder, "images"), edge)
                made_by["images"] = images.name
                black, white = (_flat(images, edge, value) for value in (0, 255))
                pixels, contents = _prepared(images, contract_images(edge), whole, not_run)
        texts: TextPreparation | None = None
        rows: dict[str, list[int]] = {}
        if model.text is not None and not sides.with_texts:
            not_run.append(NO_TOKENIZER)
        elif model.text is not None:
            with _noted(not_run):
                limit = model.text.context_length
                texts = text_preparation(model.original, sides.files, Path(folder, "texts"), limit)
                made_by |= {
                    "texts": texts.name,
                    TOKENIZER_FILES_KEY: OWN_TOKENIZER if sides.own_tokenizer else NAMED_TOKENIZER,
                }
                sentences = contract_texts(texts.added_tokens)
                rows = dict(zip(sentences, texts.run(sentences), strict=True))
        feeds = _feeds(list(pixels.values()), list(rows.values()), model)
        vectors = {part.name: vectors for part in model.parts if (vectors := _vectors(part, model, feeds, not_run))}
        words = tuple(_words(model, pixels, texts, not_run))
    if vectors:
        made_by["vectors"] = model.original.encoders_name or model.reference_name
    if words and model.original.task is not None:
        made_by["words"] = model.original.task.name
    embed = model.task(EmbedSpec)
    record = ContractRecord(
        made_by=made_by,
        images=tuple(_image_record(name, array, black, white) for name, array in pixels.items()),
        black=black,
        white=white,
        texts=tuple(TextRecord(text, tuple(ids)) for text, ids in rows.items()),
        pad_token_id=None if texts is None else texts.pad_token_id,
        vectors=vectors,
        words=words,
        score={} if embed is None or embed.score is None else _score(embed.score, model.original),
        not_run=tuple(not_run),
    )
    return OriginalSide(record, contents, images, texts)


def _score(score: ScoreSpec, original: Original) -> dict[str, float | str]:
    """What turns cosines into probabilities; the original's own numbers where it states them."""
    stated = score.to_json()
    return {name: value for name, value in {**stated, **original.score}.items() if name in stated}


def staged_bundle(root: Path, manifest: Manifest) -> OpenBundle:
    """What stands in `root` before publication, as a bundle: written by this process, so no graph is hashed."""
    graphs = [name for part in manifest.parts for v in part.variants for name in (v.file, *v.external_data)]
    files = {name: FileRecord((root / name).stat().st_size, "0" * 64) for name in graphs}
    small = [*SEALED_FILES, *(f"{layout.CONTRACT_DIRECTORY}/{path.name}" for path in _record_files(root))]
    files |= {name: record_of_file(root, name) for name in small if (root / name).is_file()}
    return _StagedBundle(root, replace(manifest, files=files), b"")


def _record_files(root: Path) -> list[Path]:
    return sorted((root / layout.CONTRACT_DIRECTORY).iterdir())


class _StagedBundle(OpenBundle):
    def _verify(self, relative: str) -> Path:
        return self.root / relative


@contextmanager
def _noted(not_run: list[str]) -> Iterator[None]:
    """Makes an original that cannot be run a note. Errors of this project's go through: they name a bad file."""
    try:
        yield
    except NotRunError as error:
        not_run.append(str(error))
    except (VlmExportError, MemoryError):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:_MAX_ERROR_CHARACTERS]}"
        not_run.append(f"the original's own library fails on this checkpoint's files: {text}")


def _flat(images: ImagePreparation, edge: int, value: int) -> tuple[float, ...]:
    """What the original gives for an image of one colour, per channel, inside of what it may pad."""
    pixels = images.run(Image.new("RGB", (edge, edge), (value, value, value)))
    return tuple(float(channel) for channel in pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2])


def _prepared(
    images: ImagePreparation, sources: Sequence[ContractImage], spec: ImageSpec | PatchSpec, not_run: list[str]
) -> tuple[dict[str, Array], dict[str, bytes]]:
    """Pixels and contents of the images that the original takes, by their names in the bundle."""
    pixels, contents = {}, {}
    for source in sources:
        name = f"{layout.CONTRACT_DIRECTORY}/{source.name}"
        try:
            prepared = images.run(Image.open(io.BytesIO(source.content)))
        except Exception as error:  # the library's own
            text = f"{type(error).__name__}: {str(error)[:_MAX_ERROR_CHARACTERS]}"
            not_run.append(f"{source.name}: the original refuses it: {text}")
            continue
        edge = spec.edge_pixels
        if prepared.shape != (3, edge, edge) and (isinstance(spec, ImageSpec) or prepared.shape[0] != 3):
            not_run.append(f"{source.name}: the original makes {prepared.shape} of it, which its own model refuses")
            continue
        pixels[name], contents[name] = prepared, source.content
    return pixels, contents


def _image_record(name: str, pixels: Array, black: Sequence[float], white: Sequence[float]) -> ImageRecord:
    whole, _ = levels(pixels, black, white)
    means = tuple(round(float(mean), 3) for mean in whole.mean(axis=(1, 2)))
    return ImageRecord(name, (pixels.shape[1], pixels.shape[2]), digest(whole), means)


def _feeds(pixels: Sequence[Array], rows: Sequence[Sequence[int]], model: Model) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    if pixels and isinstance(model.image, PatchSpec):
        feeds |= pack_patches(pixels, model.image, patch_length(part.signature for part in model.parts))
    elif pixels and len({array.shape for array in pixels}) == 1:
        feeds[_PIXELS] = np.stack(pixels)
    if rows and model.text is not None:
        width = max(model.text.least_tokens, *map(len, rows))
        ids = np.full((len(rows), width), model.text.pad_token_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        feeds |= {_IDS: ids, _MASK: mask}
    return feeds


def _vectors(part: Part, model: Model, feeds: Mapping[str, Array], not_run: list[str]) -> Arrays:
    """What the original's model gives for the inputs, for a part that starts from pixels or ids; else nothing."""
    names = part.signature.input_names
    if names not in ((_PIXELS,), PATCH_INPUTS, (_IDS,), (_IDS, _MASK)) or not set(names) <= set(feeds):
        return {}
    size = sum(tensor.nbytes for tensor in part.module.state_dict().values())
    if size > _HUGE_PART_BYTES:
        not_run.append(f"{part.name} vectors: every run takes minutes; its proof is the grid's")
        return {}
    count = _FEW if size > _LARGE_PART_BYTES else None
    load = model.original.encoders.get(part.name) or model.references[part.name]
    with _noted(not_run):
        return condensed(encode(load(), {name: feeds[name][:count] for name in names}))
    return {}


def _words(
    model: Model, pixels: Mapping[str, Array], texts: TextPreparation | None, not_run: list[str]
) -> Iterator[WordsRecord]:
    """What the original says of a few images and texts, where it can be run and the bundle has its task."""
    kinds = {task.kind for task in model.tasks} & set(get_args(WordsKind))
    task = model.original.task
    if not kinds:
        return
    if task is None or task.kind not in kinds:
        not_run.append(f"words ({', '.join(sorted(kinds))}): {_NO_WORDS}")
        return
    if texts is None or texts.decode is None or not pixels:
        not_run.append(f"words ({task.kind}): they need images and texts, prepared by the original")
        return
    size = sum(tensor.nbytes for part in model.parts for tensor in part.module.state_dict().values())
    if size > _HUGE_PART_BYTES:
        not_run.append(f"words ({task.kind}): every run takes minutes; their proof is the grid's")
        return
    caption = next((spec for spec in model.tasks if isinstance(spec, CaptionSpec)), None)
    sentences = contract_texts()[1:4] if caption is None else ("", caption.prompt)
    with _noted(not_run):
        ask = task.load()
        for text in sentences:
            (ids,) = texts.run([text])
            for name in [name for name in pixels if name.endswith(_WORDS_IMAGES)]:
                most = min(len(ids) + _WORDS_LENGTH, model.text.context_length) if model.text else _WORDS_LENGTH
                written = ask(Asked(pixels[name][None], ids, most))
                if written.margin < _LEAST_MARGIN:
                    not_run.append(f"words: {name.rpartition('/')[2]}, {text!r:.60}: two words are equally probable")
                    continue
                said = None if written.probability is not None else _without_prompt(written, texts.decode)
                yield WordsRecord(task.kind, name, text, most, said, written.probability)


def _without_prompt(written: Written, decode: Callable[[Sequence[int]], str]) -> str:
    """What was decoded behind the prompt, as the original's authors cut it off: by characters, or else by tokens."""
    prompt, text = decode(written.ids[: written.prompt_length]), decode(written.ids)
    if not text.startswith(prompt):
        prompt, text = "", decode(written.ids[written.prompt_length :])
    return text[len(prompt) :].strip() if written.prompt_length else text


def _parts_with(model: Model, name: str) -> list[Part]:
    return [part for part in model.parts if name in part.signature.input_names]
