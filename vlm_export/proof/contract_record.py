"""The record of the contract under `golden/contract/`: image files and texts, and what the original makes of them.

It holds the files, digests of their pixels, the texts and their ids, and what the original's model gives for both, so
that a machine without torch can replay the whole path from strings and files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np

from vlm_export.bundle.layout import CONTRACT_DIRECTORY
from vlm_export.bundle.manifest import Sha256
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.safe_files import record_of_file
from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays
from vlm_export.proof.tensor_proto import bytes_from_tensor, tensor_from_bytes
from vlm_export.specs.codec import Check, Spec, between, field_words
from vlm_export.specs.text import TokenId

RECORD_NAME = f"{CONTRACT_DIRECTORY}/record.json"
_MAX_FILE_BYTES = 64 << 20
_MAX_ITEMS = 1000
_FEW = Check(f"at most {_MAX_ITEMS} entries", lambda items: len(items) <= _MAX_ITEMS)
Edge: TypeAlias = Annotated[int, between(1, 1 << 16)]
WordsKind: TypeAlias = Literal["match", "caption", "answer"]
Channels: TypeAlias = Annotated[
    tuple[float, ...], Check("three numbers, or none", lambda values: len(values) in (0, 3))
]
# Of a part's output as large as token states, so many values of each row are recorded.
_RECORDED_VALUES = 2048


@dataclass(frozen=True)
class ImageRecord(Spec):
    """An image file and the pixels that the original makes of it.

    Attributes:
        file: relative to the bundle.
        size: height and width in pixels of what the vision part takes.
        sha256: of the pixels as uint8 levels (3, H, W).
        means: of the levels, per channel (R, G, B), for people.
    """

    file: str
    size: tuple[Edge, Edge]
    sha256: Sha256
    means: Channels


@dataclass(frozen=True)
class TextRecord(Spec):
    """A text and its token ids, without padding."""

    text: str
    ids: tuple[TokenId, ...]


@dataclass(frozen=True)
class WordsRecord(Spec):
    """What the original says of an image and a text: words, or how probable a match is.

    Attributes:
        image: the image's file, relative to the bundle.
        text: what the image is matched with, the prompt of a caption, or the question.
        max_length: of what is decoded, in tokens.
        words: what was written, without a prompt; None for a match.
        probability: of a match, None for words.
    """

    task: WordsKind
    image: str
    text: str
    max_length: Annotated[int, between(1, 1 << 20)]
    words: str | None = None
    probability: Annotated[float, between(0, 1)] | None = None


@dataclass(frozen=True)
class ContractRecord(Spec):
    """What the original makes of the contract's inputs.

    Attributes:
        made_by: "images", "texts", "vectors" → who computed them, with versions.
        images: empty where images are not compared.
        black, white: per channel (R, G, B) what the original gives for a black and for a white image: they turn its
            float pixels into levels of 0 to 255.
        texts: empty where texts are not compared.
        pad_token_id: with which the original fills a batch on the right, None where it has none.
        vectors: part → output → float32 (B, …), one row for each image or text.
        words: what the original writes, or how it judges a match, by greedy search in float32.
        score: the manifest's score, with the original's own number for what it states itself (`logit_scale`).
        files: side files of the bundle that were proved → their sha256.
        declared: what the manifest declared when it was proved (`proof/declared.py`).
        not_run: what was left out, one sentence each.
    """

    made_by: Mapping[str, str]
    images: Annotated[tuple[ImageRecord, ...], _FEW]
    black: Channels
    white: Channels
    texts: Annotated[tuple[TextRecord, ...], _FEW]
    pad_token_id: TokenId | None
    vectors: Mapping[str, Mapping[str, Any]]
    words: Annotated[tuple[WordsRecord, ...], _FEW] = ()
    score: Mapping[str, float | str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)
    not_run: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record's file: of the vectors, which are files of their own, the names alone."""
        names = {part: list(outputs) for part, outputs in self.vectors.items()}
        return {"schema_version": 1, **super().to_json(), "vectors": names}


@dataclass(frozen=True)
class _Head(Spec):
    """What of the record's file is no field of the record."""

    schema_version: Literal[1]
    vectors: Mapping[str, tuple[str, ...]]


def levels(pixels: Array, black: Sequence[float], white: Sequence[float]) -> tuple[Array, float]:
    """Float pixels (3, H, W) as levels.

    Returns:
        uint8 (3, H, W), and how far the farthest value is from a whole level of 0 to 255: about 1e-4 for what was made
        of levels, up to 0.5 for anything else, and infinity for NaN.
    """
    low = np.asarray(black, np.float64)[:, None, None]
    high = np.asarray(white, np.float64)[:, None, None]
    exact = (pixels.astype(np.float64) - low) / (high - low) * 255
    whole = np.clip(np.rint(np.nan_to_num(exact)), 0, 255)
    residual = float(np.abs(exact - whole).max(initial=0.0))
    return whole.astype(np.uint8), residual if residual == residual else float("inf")


def digest(whole_levels: Array) -> str:
    """sha256 of uint8 levels in C order."""
    return hashlib.sha256(np.ascontiguousarray(whole_levels).tobytes()).hexdigest()


def condensed(outputs: Arrays) -> dict[str, Array]:
    """What is recorded of a part's outputs: rows (B, D) as they are, of larger ones an even choice of values."""
    rows = {name: array.reshape(len(array), -1) for name, array in outputs.items()}
    steps = {name: 1 if outputs[name].ndim <= 2 else -(-row.shape[1] // _RECORDED_VALUES) for name, row in rows.items()}
    return {name: np.ascontiguousarray(row[:, :: steps[name]]) for name, row in rows.items()}


def write_record(root: Path, record: ContractRecord, images: Mapping[str, bytes]) -> None:
    """Writes the record and its image files under the bundle's directory.

    Args:
        images: `ImageRecord.file` → the file's bytes.
    """
    (root / CONTRACT_DIRECTORY).mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (root / name).write_bytes(content)
    for part, outputs in record.vectors.items():
        for name, array in outputs.items():
            (root / _vectors_path(part, name)).write_bytes(bytes_from_tensor(array.astype(np.float32), name))
    text = json.dumps(record.to_json(), indent=1) + "\n"
    (root / RECORD_NAME).write_text(text, encoding="ascii")


def read_record(bundle: OpenBundle) -> ContractRecord | None:
    """The bundle's record, None where it has none.

    Raises:
        InputError: it is malformed, or a file of it is missing.
    """
    if RECORD_NAME not in bundle.manifest.files:
        return None
    data = json_object_from_bytes(_content(bundle, RECORD_NAME, MAX_JSON_BYTES), RECORD_NAME)
    head = _Head.from_json({key: data.pop(key) for key in field_words(_Head) if key in data}, RECORD_NAME)
    vectors = {part: dict(_vectors(bundle, part, outputs)) for part, outputs in head.vectors.items()}
    return ContractRecord.from_json({**data, "vectors": vectors}, RECORD_NAME)


def write_record_again(bundle: OpenBundle, root: Path, declared: Mapping[str, Any] | None = None) -> None:
    """Writes a bundle's record, if it has one, for a copy of it whose side files are others.

    Args:
        root: the copy.
        declared: what its manifest declares, None for what the bundle's does.
    """
    record = read_record(bundle)
    if record is not None:
        files = {name: record_of_file(root, name).sha256 for name in record.files}
        images = {image.file: image_content(bundle, image) for image in record.images}
        write_record(root, replace(record, files=files, declared=declared or record.declared), images)


def image_content(bundle: OpenBundle, image: ImageRecord) -> bytes:
    """The bytes of a recorded image file, once they are found to be the manifest's."""
    return _content(bundle, image.file, _MAX_FILE_BYTES)


def _vectors_path(part: str, output: str) -> str:
    return f"{CONTRACT_DIRECTORY}/{part}.{output}.pb"


def _vectors(bundle: OpenBundle, part: str, outputs: Sequence[str]) -> Iterator[tuple[str, Array]]:
    for name in outputs:
        path = _vectors_path(part, name)
        yield name, tensor_from_bytes(_content(bundle, path, _MAX_FILE_BYTES), path)[1]


def _content(bundle: OpenBundle, name: str, limit: int) -> bytes:
    record = bundle.manifest.files.get(name)
    if record is None or record.size_bytes > limit:
        raise InputError(
            "the record of the contract is incomplete" if record is None else "a file of the contract is too large",
            where=name,
            expected=f"a listed file of at most {limit} bytes",
            got="none" if record is None else f"{record.size_bytes} bytes",
            fix="the bundle was changed; export the model again",
        )
    return bundle.file(name).read_bytes()
