"""The bundle's side files through the readers of other consumers: AutoImageProcessor, AutoTokenizer and AutoConfig.

Where a class of transformers cannot express what the original does (OpenAI's crop rounds otherwise, its conversion to
RGB comes last, its texts are repaired first), the difference is said instead of judged.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
from PIL import Image

from vlm_export.bundle import layout
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.exporting.originals import (
    ImagePreparation,
    NotRunError,
    TextPreparation,
    transformers_images,
    transformers_tokenizer,
)
from vlm_export.exporting.tokenizers.files import ResolvedTokenizer
from vlm_export.family import Model
from vlm_export.models.reading.transformers_classes import IMAGE_CLASSES, MODEL_TYPES, TOKENIZER_CLASSES
from vlm_export.proof.contract import ContractCheck
from vlm_export.proof.contract_files import config_failures, differences
from vlm_export.proof.contract_record import ContractRecord, digest, levels
from vlm_export.proof.metrics import Array
from vlm_export.runtime.inputs.texts import cleaned_text
from vlm_export.specs import ImageSpec, PatchSpec, TextCleaning

_TOKENIZER_FILES = (layout.TOKENIZER_NAME, layout.TOKENIZER_CONFIG_NAME, "special_tokens_map.json")
_MAX_NAMED = 6

ConsumerChecks: TypeAlias = tuple[list[ContractCheck], list[str], list[str]]
"""Checks, numbers that are measured, and what was not run."""


def check_consumers(
    bundle: OpenBundle,
    record: ContractRecord,
    contents: Mapping[str, bytes],
    images: ImagePreparation | None,
    texts: TextPreparation | None,
) -> ConsumerChecks:
    """The record's images and texts through the bundle's side files."""
    checks: list[ContractCheck] = []
    measured: list[str] = []
    not_run: list[str] = []
    readers: tuple[Callable[[Path], Iterator[ContractCheck]], ...] = (
        # Each folder holds the files of one reader alone.
        lambda folder: _check_images(bundle, folder, record, contents, images, measured),
        lambda folder: _check_texts(bundle, folder, record, texts, measured),
        lambda folder: _check_config(bundle, folder),
    )
    for reader in readers:
        with TemporaryDirectory(prefix="vlm-export-") as folder:
            try:
                checks += reader(Path(folder))
            except NotRunError as error:
                not_run.append(str(error))
    return checks, measured, not_run


def check_published(bundle: OpenBundle, model: Model, tokenizer: ResolvedTokenizer | None) -> list[ContractCheck]:
    """The side files against those that an export of the source publishes.

    Args:
        tokenizer: of the source, None where the bundle's is another or none.
    """
    variants = [variant for part in bundle.manifest.parts for variant in part.variants]
    expected = {layout.CONFIG_NAME: layout.json_bytes(layout.hub_config(model.hub_config, variants))}
    if isinstance(model.image, ImageSpec | PatchSpec):
        expected[layout.PREPROCESSOR_NAME] = layout.json_bytes(layout.preprocessor_config(model.image))
    if tokenizer is not None:
        expected |= tokenizer.files
    return [_published(bundle, name, content) for name, content in expected.items()]


def _published(bundle: OpenBundle, name: str, expected: bytes) -> ContractCheck:
    if name not in bundle.manifest.files:
        return ContractCheck(f"{name} as published", name, 1, (f"an export of the source publishes {name}",))
    got = bundle.file(name).read_bytes()
    failures: tuple[str, ...] = ()
    if got != expected:
        left, right = (json_object_from_bytes(raw, name) for raw in (expected, got))
        found = list(differences(left, right))
        failures = tuple(f"{name}: {text}" for text in found[:_MAX_NAMED])
    return ContractCheck(f"{name} as published", name, 1, failures)


def _check_images(
    bundle: OpenBundle,
    folder: Path,
    record: ContractRecord,
    contents: Mapping[str, bytes],
    original: ImagePreparation | None,
    measured: list[str],
) -> Iterator[ContractCheck]:
    spec = bundle.manifest.image
    if (
        original is None
        or layout.PREPROCESSOR_NAME not in bundle.manifest.files
        or not isinstance(spec, ImageSpec | PatchSpec)
    ):
        return
    _copied(bundle, folder, (layout.PREPROCESSOR_NAME,), "image_processor_type", IMAGE_CLASSES)
    reader = transformers_images(folder)
    own, edge = original.own, spec.edge_pixels
    failures, other = list[str](), list[str]()
    farthest, refused = 0, ""
    for item in record.images:
        name, image = item.file.rpartition("/")[2], Image.open(io.BytesIO(contents[item.file]))
        crops_even = isinstance(spec, ImageSpec) and spec.crop == "nearest_even"
        pads = isinstance(spec, ImageSpec) and spec.resize == "longest_edge"
        plain = own or (not pads and _is_plain(image, edge, crops=crops_even))
        pixels = _outcome(reader.run, image)
        if isinstance(pixels, str) or digest(levels(pixels, record.black, record.white)[0]) != item.sha256:
            (failures if plain else other).append(f"{name}{f': {pixels}' if isinstance(pixels, str) else ''}")
        elif reader.other is not None:
            fast = _outcome(reader.other[1], image)
            if isinstance(fast, str):
                refused = fast
                continue
            whole = levels(fast, record.black, record.white)[0].astype(np.int64)
            farthest = max(farthest, int(np.abs(whole - levels(pixels, record.black, record.white)[0]).max()))
    if reader.other is not None:
        seen = f"up to {farthest} levels of 255 from the Pillow back end, on the contract's images"
        seen = f"it does not prepare them ({refused})" if refused else seen
        measured.append(f"{layout.PREPROCESSOR_NAME} in {reader.other[0]} (torchvision): {seen}")
    if other:
        measured.append(
            f"{layout.PREPROCESSOR_NAME}: {reader.name} prepares {', '.join(other[:_MAX_NAMED])} otherwise than "
            f"{original.name}, which no class of transformers expresses"
        )
    yield _check(layout.PREPROCESSOR_NAME, "AutoImageProcessor", reader.name, len(record.images) - len(other), failures)


def _check_texts(
    bundle: OpenBundle, folder: Path, record: ContractRecord, original: TextPreparation | None, measured: list[str]
) -> Iterator[ContractCheck]:
    if (
        original is None
        or not record.texts
        or bundle.manifest.text is None
        or layout.TOKENIZER_NAME not in bundle.manifest.files
    ):
        return
    _copied(bundle, folder, _TOKENIZER_FILES, "tokenizer_class", TOKENIZER_CLASSES)
    reader = transformers_tokenizer(folder, bundle.manifest.text.context_length)
    own, failures, other = original.own, list[str](), list[str]()
    try:
        rows = reader.run([text.text for text in record.texts])
    except Exception as error:  # the library's own
        yield _check(
            layout.TOKENIZER_CONFIG_NAME, "AutoTokenizer", reader.name, 0, [f"{type(error).__name__}: {error}"[:200]]
        )
        return
    for item, row in zip(record.texts, rows, strict=True):
        if tuple(row) != item.ids:
            plain = own or _is_plain_text(item.text, bundle.manifest.text.cleaning)
            (failures if plain else other).append(ascii(item.text[:40]))
    if own and record.pad_token_id not in (None, reader.pad_token_id):
        failures.append(f"padding with id {reader.pad_token_id} instead of {record.pad_token_id}")
    if other:
        measured.append(
            f"{layout.TOKENIZER_NAME}: {reader.name} splits {', '.join(other[:_MAX_NAMED])} otherwise than "
            f"{original.name}, which repairs texts first"
        )
    yield _check(layout.TOKENIZER_CONFIG_NAME, "AutoTokenizer", reader.name, len(record.texts) - len(other), failures)


def _is_plain_text(text: str, cleaning: TextCleaning) -> bool:
    """Whether a tokenizer of transformers alone reads the text as the original does, which repairs texts first."""
    unchanged = cleaning in ("openai", "open_clip") or cleaned_text(text, cleaning) == text
    return unchanged and text.isascii() and text.isprintable() and not set("&<>") & set(text)


def _check_config(bundle: OpenBundle, folder: Path) -> Iterator[ContractCheck]:
    if layout.CONFIG_NAME not in bundle.manifest.files:
        return
    _copied(bundle, folder, (layout.CONFIG_NAME,), "model_type", MODEL_TYPES)
    try:
        config = import_module("transformers").AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library's own: it has no such image encoder (a ResNet), for instance
        raise NotRunError(f"{layout.CONFIG_NAME}: AutoConfig does not read it: {error}") from error
    compared, failures = config_failures(bundle, config.to_dict())
    yield _check(layout.CONFIG_NAME, "AutoConfig", type(config).__name__, compared, failures)


def _copied(bundle: OpenBundle, folder: Path, names: Sequence[str], key: str, allowed: frozenset[str]) -> None:
    """Copies of the bundle's files, once those that name a class name one of the list.

    Raises:
        NotRunError: they name another one, or none.
    """
    stated = None
    for name in names:
        if name in bundle.manifest.files:
            raw = bundle.file(name).read_bytes()
            (folder / name).write_bytes(raw)
            if name != layout.TOKENIZER_NAME:
                stated = json_object_from_bytes(raw, name).get(key, stated)
    if stated not in allowed:
        raise NotRunError(f"{names[-1]}: {key} {stated!r:.80} is not one of the classes that are run")


def _outcome(run: Callable[[Image.Image], Array], image: Image.Image) -> Array | str:
    try:
        return run(image)
    except Exception as error:  # the library's own
        return f"{type(error).__name__}: {error}"[:200]


def _is_plain(image: Image.Image, edge: int, *, crops: bool) -> bool:
    """Whether transformers and torchvision pipelines agree: RGB, and no margin that they round in two ways."""
    width, height = image.size
    margin = int(edge * max(width, height) / min(width, height)) - edge
    return image.mode == "RGB" and not (crops and margin % 4 == 3)


def _check(name: str, auto: str, reader: str, compared: int, failures: Sequence[str]) -> ContractCheck:
    named = ", ".join(failures[:_MAX_NAMED])
    sentences = (f"{name}, as {auto} reads it ({reader}), is not the original's: {named}",) if failures else ()
    return ContractCheck(auto, name, compared, sentences)
