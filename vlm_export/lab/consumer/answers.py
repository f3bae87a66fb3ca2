"""A consumer's answers: read from files or a mapping, checked, and put beside the questions that they answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_export.errors import InputError, suggestion
from vlm_export.machine_faults import machine_fault
from vlm_export.proof.metrics import Array

IDS, PIXELS, TEXT_VECTORS, IMAGE_VECTORS = "ids", "pixels", "text_vectors", "image_vectors"
TEXTS, IMAGES = "texts", "images"
ANSWERS = (IDS, PIXELS, TEXT_VECTORS, IMAGE_VECTORS)
_KEYS = (*ANSWERS, TEXTS, IMAGES)
_EXPECTED = "a .json file, or a folder with " + ", ".join(f"{name}.json or .npy" for name in ANSWERS)
_MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class Answers:
    """What a consumer makes of the questions; None is what it does not show.

    Attributes:
        texts: the texts' numbers among the questions, a row's each.
        images: the images' numbers, likewise.
        ids: one row of token ids for each text, padding included where the consumer pads.
        pixels: one array of three axes for each image.
        text_vectors, image_vectors: float64 (N, D).
    """

    texts: tuple[int, ...]
    images: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...] | None
    pixels: tuple[Array, ...] | None
    text_vectors: Array | None
    image_vectors: Array | None


def read_answers(path: Path) -> dict[str, Any]:
    """What the files hold, by name.

    Raises:
        InputError: there are none, one cannot be read, or two hold the same.
    """
    if path.is_dir():
        found = [path / f"{name}{suffix}" for name in _KEYS for suffix in (".json", ".npy")]
        found = [file for file in found if file.is_file()]
        names = [file.stem for file in found]
        if not set(names) & set(ANSWERS):
            got = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"
            raise InputError("the folder holds no answers", where=str(path), expected=_EXPECTED, got=got)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{twice[0]} is there twice", where=str(path), expected="a .json or a .npy file")
        return {file.stem: _content(file) for file in found}
    if path.suffix == ".json" and path.exists():
        content = _content(path)
        if isinstance(content, dict):
            return content
        got = f"a {type(content).__name__}"
        raise InputError("the answers are no JSON object", where=str(path), expected='{"ids": [[…], …], …}', got=got)
    got = f"a {path.suffix or 'nameless'} file" if path.exists() else "no such file"
    raise InputError("there are no answers here", where=str(path), expected=_EXPECTED, got=got)


def checked_answers(given: Mapping[str, Any], texts: Sequence[str], images: Sequence[str], where: str) -> Answers:
    """The answers, once names, numbers of rows and shapes fit.

    Args:
        texts, images: the questions; images by their files' names.

    Raises:
        InputError: they do not fit; the message names the answer and both numbers.
    """
    for name in given:
        if name not in _KEYS:
            raise InputError(f"no such answer: {name!r}", where=where, fix=suggestion(name, _KEYS))
    if not any(given.get(name) is not None for name in ANSWERS):
        raise InputError("there are no answers here", where=where, expected=f"any of {', '.join(ANSWERS)}", got="none")
    chosen_texts = _chosen(given.get(TEXTS), texts, f"{where}: {TEXTS}")
    chosen_images = _chosen(given.get(IMAGES), images, f"{where}: {IMAGES}")
    counts = {IDS: len(chosen_texts), TEXT_VECTORS: len(chosen_texts)}
    counts |= {PIXELS: len(chosen_images), IMAGE_VECTORS: len(chosen_images)}

    def rows(name: str) -> Any:
        value, place = given.get(name), f"{where}: {name}"
        if value is None:
            return None
        if not isinstance(value, list | tuple | np.ndarray) or (isinstance(value, np.ndarray) and not value.ndim):
            raise InputError(f"{name} is no list of rows", where=place, got=type(value).__name__)
        if len(value) != counts[name]:
            kind = TEXTS if name in (IDS, TEXT_VECTORS) else IMAGES
            raise InputError(
                f"{name} has another number of rows than there are {kind}",
                where=place,
                expected=f"{counts[name]} rows, one for each of the {kind}",
                got=f"{len(value)} rows",
                fix=f"answer all, in the order of the questions; or name those that are answered in {kind}.json",
            )
        return value

    ids, pixels, vectors = rows(IDS), rows(PIXELS), [rows(name) for name in (TEXT_VECTORS, IMAGE_VECTORS)]
    return Answers(
        chosen_texts,
        chosen_images,
        None if ids is None else tuple(_id_row(row, f"{where}: {IDS}, row {i}") for i, row in enumerate(ids)),
        None if pixels is None else tuple(_image(row, f"{where}: {PIXELS}, row {i}") for i, row in enumerate(pixels)),
        *(
            None if found is None else _vectors(found, f"{where}: {name}")
            for name, found in zip((TEXT_VECTORS, IMAGE_VECTORS), vectors, strict=True)
        ),
    )


def _content(file: Path) -> Any:
    try:
        if file.stat().st_size > _MAX_BYTES:
            got = f"{file.stat().st_size} bytes"
            raise InputError("a file of answers is too large", where=str(file), expected=f"{_MAX_BYTES} bytes", got=got)
        if file.suffix == ".npy":
            return np.load(file, allow_pickle=False)
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise machine_fault(error, str(file)) or InputError(
            "a file of answers cannot be read",
            where=str(file),
            expected="an array of numbers" if file.suffix == ".npy" else "JSON",
            got=str(error) or type(error).__name__,
        ) from error


def _chosen(names: Any, known: Sequence[str], where: str) -> tuple[int, ...]:
    """The numbers of the questions that are answered; all where none is named."""
    if names is None:
        return tuple(range(len(known)))
    places = {name: i for i, name in enumerate(known)}
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name in places for name in names):
        odd = next((name for name in names if name not in places), "") if isinstance(names, list | tuple) else names
        raise InputError("no such question", where=where, expected="a list of the questions", got=repr(odd)[:100])
    return tuple(places[name] for name in names)


def _array(value: Any, where: str, kinds: str, expected: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in kinds:
        got = "rows that make no array" if array.dtype == object else f"{array.dtype} {array.shape}"
        raise InputError("an answer has another shape or dtype", where=where, expected=expected, got=got)
    return array


def _id_row(row: Any, where: str) -> tuple[int, ...]:
    array = _array(row, where, "iu" if len(row) else "iuf", "a list of token ids")
    if array.ndim != 1:
        raise InputError("an answer has another shape or dtype", where=where, expected="(T,)", got=str(array.shape))
    return tuple(map(int, array))


def _image(value: Any, where: str) -> Array:
    array = _array(value, where, "iuf", "numbers (3, height, width)")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or not array.size:
        got = str(array.shape)
        raise InputError("an answer has another shape or dtype", where=where, expected="(3, height, width)", got=got)
    return array.astype(np.float32)


def _vectors(value: Any, where: str) -> Array:
    array = _array(value, where, "iuf", "numbers (N, D)")
    if array.ndim == 3 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 2 or not array.size:
        got = str(array.shape)
        raise InputError("an answer has another shape or dtype", where=where, expected="(N, D)", got=got)
    return array.astype(np.float64)
