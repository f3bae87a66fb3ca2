"""The contract: image files and strings in, the original's vectors out, through the bundle's own preparation.

`replay` needs neither torch nor the original: it compares the bundle with what `contract_record` holds. An export makes
the record from the original and replays it before anything is published, so a proof and its repetition are one code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import MANIFEST_NAME
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, VerificationError
from vlm_export.proof.contract_files import check_config, check_preprocessor, check_sealed
from vlm_export.proof.contract_record import (
    RECORD_NAME,
    ContractRecord,
    condensed,
    digest,
    image_content,
    levels,
    read_record,
)
from vlm_export.proof.contract_words import FLOAT32, WORDS_NOT_RUN, check_words, runs_words
from vlm_export.proof.declared import first_difference, version_difference
from vlm_export.proof.gates import GATES, Gate, judge, variant_gate
from vlm_export.proof.metrics import Array, Comparison, compare, worst_of
from vlm_export.proof.points import Arrays, EngineRun
from vlm_export.runtime.engines.onnxruntime import batches
from vlm_export.runtime.inputs.images import open_image, preprocess_image
from vlm_export.runtime.inputs.patches import pack_patches, patch_length
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import ImageSpec, PatchSpec
from vlm_export.specs.tasks import EmbedSpec

CONTRACT = "contract"
PACKAGED = "this directory is packaged for {}, which prepares images and texts itself"
IMAGE_STAGE, TEXT_STAGE = "image preparation", "tokenizer"
NO_RECORD = "the contract: this bundle holds no record of it (golden/contract); export the model again to have one"
# A level is 1/255; float32 pixels lie within 1e-4 of one. A mean off by 1e-4 moves them by 0.02.
_LARGEST_RESIDUAL = 0.01
_TOGETHER = 8
_RELATIVE = 1e-5
_PIXELS, _IDS, _MASK = "pixel_values", "input_ids", "attention_mask"
_MAX_SHOWN = 60


@dataclass(frozen=True)
class ContractCheck:
    """One stage of the contract.

    Attributes:
        stage: what was compared: "image preparation", "tokenizer", "vision vectors", or a file's name.
        where: the file that a failure is in.
        variant: precision of the graph, "" where none is run.
        compared: number of images, texts or fields.
        failures: one sentence each, with expected and got.
        comparison: worst numbers of vectors, None elsewhere.
    """

    stage: str
    where: str
    compared: int
    failures: tuple[str, ...]
    variant: str = ""
    comparison: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "where": self.where,
            "variant": self.variant,
            "compared": self.compared,
            "passed": not self.failures,
            "failures": list(self.failures[:5]),
            "failure_count": len(self.failures),
            "worst": None if self.comparison is None else self.comparison.to_json(),
        }


@dataclass(frozen=True)
class ContractReport:
    """All stages that were compared.

    Attributes:
        made_by: "images", "texts", "vectors" → who computed what is expected.
        not_run: what was left out, one sentence each.
        measured: further numbers that no gate judges, one sentence each.
    """

    checks: tuple[ContractCheck, ...]
    made_by: Mapping[str, str]
    not_run: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No stage failed; what was not run is said in `not_run`."""
        return not any(check.failures for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as strict JSON data, for the manifest and `--json`."""
        return {
            "passed": self.passed,
            "made_by": dict(self.made_by),
            "checks": [check.to_json() for check in self.checks],
            "not_run": list(self.not_run),
            "measured": list(self.measured),
        }

    def raise_if_failed(self) -> None:
        """VerificationError that names the first failing stage and its file."""
        failing = [check for check in self.checks if check.failures]
        if not failing:
            return
        check, others = failing[0], [other.stage for other in failing[1:]]
        raise VerificationError(
            f"the contract does not hold, at the stage {check.stage!r}"
            + (f" (also: {', '.join(dict.fromkeys(others))})" if others else ""),
            where=check.where,
            expected="what the original prepares and computes: " + (", ".join(self.made_by.values()) or "the record"),
            got=check.failures[0],
            fix="this bundle must not be used; get it again, or export the model again",
        )


StartEngine = Callable[[str, str], EngineRun]
"""Part name and precision → what executes that graph."""


def replay(
    bundle: OpenBundle,
    start_engine: StartEngine,
    *,
    record: ContractRecord | None = None,
    images: Mapping[str, bytes] | None = None,
    precision: str | None = None,
) -> ContractReport:
    """Compares a bundle with the record of what the original makes of images and texts.

    Args:
        record: None for the bundle's own.
        images: bytes of the record's image files, None for those in the bundle.
        precision: only these variants of the graphs.
    """
    record = record or read_record(bundle)
    checks = [_check_versions(bundle, precision)]
    packaged_for = bundle.manifest.export.packaged_for
    if packaged_for is not None and record is None and not bundle.manifest.tasks:
        return ContractReport(tuple(checks), {}, (PACKAGED.format(packaged_for),))
    checks += [_as_check(*check) for check in (check_preprocessor(bundle), check_config(bundle)) if check is not None]
    if record is None:
        if bundle.manifest.export.contract is not None:
            gone = f"the manifest says that the contract was proved, and {RECORD_NAME} is not listed"
            checks.append(_as_check(MANIFEST_NAME, 1, [gone]))
        return ContractReport(tuple(checks), {}, (NO_RECORD,))
    pixels: list[Array] = []
    contents = {i.file: image_content(bundle, i) if images is None else images[i.file] for i in record.images}
    if record.images:
        check, pixels = _check_images(bundle, record, contents)
        checks.append(check)
    feeds: dict[str, Array] = {}
    if record.texts:
        check, feeds = _check_texts(bundle, record)
        checks.append(check)
    checks += _check_score(bundle, record)
    checks += _check_vectors(bundle, record, start_engine, pixels, feeds, precision)
    not_run = record.not_run
    if record.words and runs_words(bundle, precision):
        for task, where, compared, failures in check_words(bundle, record.words, contents):
            checks.append(ContractCheck(task, where, compared, tuple(failures), FLOAT32))
    elif record.words:
        not_run = (*not_run, WORDS_NOT_RUN)
    checks.append(_as_check(*check_sealed(bundle, record.files)))
    checks.append(_check_declared(bundle, record))
    return ContractReport(tuple(checks), record.made_by, not_run)


def _check_versions(bundle: OpenBundle, precision: str | None) -> ContractCheck:
    """What the manifest declares of each graph that was asked for, against the graph itself."""
    graphs = bundle.manifest.chosen(precision)
    found = [
        (f"part {part.name!r} at {variant.precision}", version_difference(bundle, variant)) for part, variant in graphs
    ]
    failures = tuple(f"{place}: {text}" for place, text in found if text)
    return ContractCheck("versions", MANIFEST_NAME, len(graphs), failures)


def _check_declared(bundle: OpenBundle, record: ContractRecord) -> ContractCheck:
    found = first_difference(record.declared, bundle.manifest)
    failures = () if found is None else (str(found),)
    return ContractCheck("manifest", MANIFEST_NAME, len(record.declared), failures)


def _as_check(where: str, compared: int, failures: Sequence[str]) -> ContractCheck:
    return ContractCheck(where, where, compared, tuple(failures))


def _check_images(
    bundle: OpenBundle, record: ContractRecord, contents: Mapping[str, bytes]
) -> tuple[ContractCheck, list[Array]]:
    """Every image file through the runtime; and its pixels, where it took them."""
    spec, failures, prepared = bundle.manifest.image, list[str](), list[Array]()
    if not isinstance(spec, ImageSpec | PatchSpec):
        missing = "the manifest states no preparation of images"
        return ContractCheck(IMAGE_STAGE, f"{MANIFEST_NAME}: image", 0, (missing,)), []
    for image in record.images:
        name = image.file.rpartition("/")[2]
        try:
            pixels = preprocess_image(open_image(contents[image.file], name=name), spec, name=name)
        except InputError as error:
            failures.append(f"{name}: the original prepares it, the runtime does not: {error.what}: {error.got}")
            continue
        prepared.append(pixels)
        whole, residual = levels(pixels, record.black, record.white)
        if pixels.shape[1:] != image.size:
            failures.append(f"{name}: expected {image.size[1]} x {image.size[0]} pixels, got {pixels.shape[:0:-1]}")
        elif not residual <= _LARGEST_RESIDUAL:
            failures.append(
                f"{name}: the normalisation (image_mean, image_std, rescale_factor) is not the original's: "
                f"a pixel is {residual:.3g} levels of 255 away from any of its values"
            )
        elif digest(whole) != image.sha256:
            means = ", ".join(f"{mean:.1f}" for mean in whole.mean(axis=(1, 2)))
            stated = ", ".join(f"{mean:.1f}" for mean in image.means)
            failures.append(
                f"{name}: resize, crop, filter, colours or transparency are not the original's: other pixels "
                f"(mean levels of R, G, B: expected {stated}, got {means})"
            )
    return ContractCheck(IMAGE_STAGE, f"{MANIFEST_NAME}: image", len(record.images), tuple(failures)), prepared


def _check_texts(bundle: OpenBundle, record: ContractRecord) -> tuple[ContractCheck, dict[str, Array]]:
    """Every text through the bundle's tokenizer; and the batch of ids with its mask."""
    spec = bundle.manifest.text
    if spec is None or TOKENIZER_NAME not in bundle.manifest.files:
        failure = f"the bundle has no {TOKENIZER_NAME}, and its record has texts"
        return ContractCheck(TEXT_STAGE, TOKENIZER_NAME, 0, (failure,)), {}
    try:
        tokenizer = Tokenizer(bundle.file(TOKENIZER_NAME), spec)
        rows = tokenizer.encode_rows([text.text for text in record.texts], truncate=True)
    except InputError as error:
        failure = (
            f"the runtime cannot encode the record's texts: {error.what}: expected {error.expected}, got {error.got}"
        )
        return ContractCheck(TEXT_STAGE, TOKENIZER_NAME, len(record.texts), (failure,)), {}
    failures = [
        f"{_short(text.text)}: expected ids {_around(text.ids, row)}, got {_around(row, text.ids)}"
        for text, row in zip(record.texts, rows, strict=True)
        if list(text.ids) != row
    ]
    if record.pad_token_id is not None and record.pad_token_id != spec.pad_token_id:
        failures.append(f"padding: expected id {record.pad_token_id}, got {spec.pad_token_id} (text.pad_token_id)")
    ids, mask = tokenizer.pad_masked(rows)
    return ContractCheck(TEXT_STAGE, TOKENIZER_NAME, len(rows), tuple(failures)), {_IDS: ids, _MASK: mask}


def _check_score(bundle: OpenBundle, record: ContractRecord) -> Iterator[ContractCheck]:
    task = bundle.manifest.task(EmbedSpec)
    score = {} if task is None or task.score is None else task.score.to_json()
    failures = [
        f"{name}: expected {expected!r}, got {score.get(name)!r:.80}"
        for name, expected in record.score.items()
        if not _agree(expected, score.get(name))
    ]
    if record.score:
        yield ContractCheck("score", f"{MANIFEST_NAME}: tasks.embed.score", len(record.score), tuple(failures))


def _agree(expected: float | str, got: object) -> bool:
    if isinstance(expected, str):
        return got == expected
    return isinstance(got, int | float) and abs(got - expected) <= _RELATIVE * max(1.0, abs(expected))


def _check_vectors(
    bundle: OpenBundle,
    record: ContractRecord,
    start_engine: StartEngine,
    pixels: Sequence[Array],
    feeds: Mapping[str, Array],
    precision: str | None,
) -> Iterator[ContractCheck]:
    images, texts = [i.file.rpartition("/")[2] for i in record.images], [_short(t.text) for t in record.texts]
    for name, expected in record.vectors.items():
        part = bundle.manifest.part(name)
        takes_images = _PIXELS in part.signature.input_names
        names, given = (images, image_feeds(bundle, pixels)) if takes_images else (texts, feeds)
        for variant in part.chosen_variants(precision):
            compared, comparison = 0, None
            missing = ", ".join(key for key in part.signature.input_names if key not in given)
            if not given or (takes_images and len(pixels) < len(images)):
                failures = ["the graph cannot be run: its inputs could not be prepared"]
            elif missing:
                failures = [f"the manifest names inputs that the record does not have: {missing}"]
            else:
                count = min(len(rows) for rows in expected.values())
                inputs = {key: given[key][:count] for key in part.signature.input_names}
                gate = variant_gate(name, variant)
                try:
                    got = condensed(encode(start_engine(name, variant.precision), inputs))
                    compared = len(names)
                    failures, comparison = _compare_vectors(expected, got, gate, names)
                except InputError as error:
                    failures = [f"the graph cannot be run: {error.what}: {error.got}"]
            stage = f"{name} vectors"
            yield ContractCheck(stage, variant.file, compared, tuple(failures), variant.precision, comparison)


def _compare_vectors(
    expected: Mapping[str, Array], got: Mapping[str, Array], gate: Gate, names: Sequence[str]
) -> tuple[list[str], Comparison | None]:
    """What breaks the gate, and the worst numbers; names: what the rows are."""
    failures, worst = [f"{output}: the graph has no such output" for output in expected if output not in got], []
    for output in [name for name in expected if name in got]:
        worst.append(compare(expected[output], got[output]))
        broken = judge(worst[-1], gate)
        failures += [f"{output}: {text}{_farthest(expected[output], got[output], names)}" for text in broken]
    return failures, worst_of(worst) if worst else None


def image_feeds(bundle: OpenBundle, pixels: Sequence[Array]) -> Mapping[str, Array]:
    """The inputs of a vision part for prepared images (3, H, W), all in one batch; none for no image."""
    if not pixels:
        return {}
    if isinstance(spec := bundle.manifest.image, PatchSpec):
        return pack_patches(pixels, spec, patch_length(part.signature for part in bundle.manifest.parts))
    return {_PIXELS: np.stack(pixels)}


def compare_records(own: ContractRecord, again: ContractRecord) -> Iterator[ContractCheck]:
    """A bundle's record against what the original gives now; of what both have."""
    for key in ("images", "black", "white", "texts", "pad_token_id", "words", "score"):
        recorded, fresh = getattr(own, key), getattr(again, key)
        if recorded and fresh and recorded != fresh:
            failure = f"{key}: the record is not what the original gives"
            yield ContractCheck(f"{key} recorded", RECORD_NAME, 1, (failure,))
    for name, outputs in again.vectors.items():
        failures, recorded = list[str](), own.vectors.get(name, {})
        for output, expected in outputs.items():
            got = recorded.get(output)
            broken = ["the record has none"] if got is None else judge(compare(expected, got), GATES["fp32"])
            failures += [f"{name} {output}: {text}" for text in broken]
        rows = min(map(len, outputs.values()))
        yield ContractCheck(f"{name} recorded", RECORD_NAME, rows, tuple(failures))


def encode(run: Callable[[Arrays], Mapping[str, Array]], inputs: Arrays) -> dict[str, Array]:
    """A part's outputs for all rows, a few rows at a time, so that their number decides no memory."""
    count = len(next(iter(inputs.values())))
    parts = [
        run({name: array[list(rows)] for name, array in inputs.items()}) for rows in batches(range(count), _TOGETHER)
    ]
    for name, array in parts[0].items():
        if not array.ndim:
            raise InputError("a graph returned a value that has no rows", where=name, expected="(batch, …)", got="()")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _farthest(reference: Array, got: Array, names: Sequence[str]) -> str:
    """Which row is farthest off, where there is one for each name."""
    if reference.shape != got.shape or len(reference) != len(names):
        return ""
    difference = np.abs(reference.astype(np.float64) - got).reshape(len(names), -1).max(axis=1)
    return f" (farthest: {names[int(np.argmax(difference))]})"


def _short(text: str) -> str:
    return ascii(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")


def _around(ids: Sequence[int], other: Sequence[int]) -> str:
    """The ids from a little before the first that differs, and how many there are."""
    first = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    start = max(0, first - 2)
    shown = ", ".join(map(str, ids[start : first + 4]))
    return f"[{'… ' if start else ''}{shown}{' …' if first + 4 < len(ids) else ''}] ({len(ids)})"
