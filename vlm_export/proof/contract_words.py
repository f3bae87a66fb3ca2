"""The contract of tasks that answer in words or scores: image files and strings in, the original's words out.

The bundle's own tasks do it, as for whoever loads it. Words are compared in float32 alone: half precision may choose
another word where two are almost as probable.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

from PIL import Image

from vlm_export.bundle.manifest import MANIFEST_NAME, PRECISIONS
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError
from vlm_export.proof.contract_record import WordsRecord
from vlm_export.runtime.model import Model
from vlm_export.runtime.session import Session

WORDS_NOT_RUN = "words: they are compared in float32 alone, of which the bundle or --precision leaves out a part"
LARGEST_DIFFERENCE = 1e-4
"""Of a probability."""
FLOAT32 = PRECISIONS[0]


def runs_words(bundle: OpenBundle, precision: str | None) -> bool:
    """Whether every part has a float32 variant, and no other precision was asked for."""
    every = all(FLOAT32 in {variant.precision for variant in part.variants} for part in bundle.manifest.parts)
    return every and precision in (None, FLOAT32)


def check_words(
    bundle: OpenBundle, records: tuple[WordsRecord, ...], contents: Mapping[str, bytes]
) -> Iterator[tuple[str, str, int, list[str]]]:
    """Stage, place, number compared and failures, for each task of the records.

    Args:
        contents: bytes of the image files by their names in the bundle.
    """
    model = Model(Session(bundle, precision=FLOAT32))
    for task in dict.fromkeys(record.task for record in records):
        own = [record for record in records if record.task == task]
        failures = [text for record in own if (text := _failure(model, record, contents[record.image]))]
        yield task, f"{MANIFEST_NAME}: tasks.{task}", len(own), failures


def _failure(model: Model, record: WordsRecord, content: bytes) -> str:
    """What differs, or nothing."""
    name = f"{record.image.rpartition('/')[2]}, {record.text!a:.60}"
    image = Image.open(io.BytesIO(content))
    try:
        if record.task == "match":
            (found,) = model.match(image, record.text, truncate=True)
            near = record.probability is not None and abs(found.probability - record.probability) <= LARGEST_DIFFERENCE
            return "" if near else f"{name}: expected {record.probability}, got {found.probability:.6g}"
        options = {"beams": 1, "max_length": record.max_length, "min_length": 0}
        if record.task == "caption":
            (words,) = model.caption(image, prompt=record.text, **options)
        else:
            (words,) = model.answer(image, record.text, truncate=True, **options)
    except (InputError, UsageError) as error:
        return f"{name}: the original answers, the runtime does not: {error.what}: {error.got}"
    return "" if words == record.words else f"{name}: expected {record.words!a:.120}, got {words!a:.120}"
