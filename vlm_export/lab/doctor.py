"""Whose mistake it is: a consumer's answers against the contract's record, stage by stage, and the likeliest mistakes.

A mistake is a hypothesis that is tried: made on purpose with the bundle's own preparation and graph, and compared with
what the consumer has. A consumer that does what the bundle's files say is right, also where those files cannot say all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError
from vlm_export.lab.consumer.answers import checked_answers, read_answers
from vlm_export.lab.consumer.case import Case
from vlm_export.lab.consumer.inputs import ids_stage, pixel_stage
from vlm_export.lab.consumer.questions import asked_images, required_record
from vlm_export.lab.consumer.report import Diagnosis
from vlm_export.lab.consumer.vectors import image_vector_stage, text_vector_stage
from vlm_export.runtime.session import Session


def doctor(
    bundle: str | Path,
    answers: str | Path | Mapping[str, Any],
    *,
    precision: str | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
) -> Diagnosis:
    """Finds the first stage at which a consumer departs from the original, and the likeliest mistake.

    Args:
        bundle: the bundle's directory.
        answers: a file or folder of answers, or a mapping: "ids" (lists of integers), "pixels" (N, 3, H, W),
            "text_vectors" and "image_vectors" (N, D), and where not all is answered "texts" and "images", which name
            the rows; the questions are what `write_questions` writes, images in the order of their names.
        precision: the variant that the consumer runs, which decides how near its vectors must be.

    Raises:
        InputError: the answers do not fit the questions, none can be compared, or the bundle has no record of the
            contract.
    """
    opened = open_bundle(bundle)
    session = Session(opened, precision=precision, providers=providers, threads=threads)
    record = required_record(opened)
    where = "answers" if isinstance(answers, Mapping) else str(answers)
    given = answers if isinstance(answers, Mapping) else read_answers(Path(answers))
    names = [name for name, _ in asked_images(record)]
    checked = checked_answers(given, [text.text for text in record.texts], names, where)
    case = Case(session, record, checked)
    ids, pixels = ids_stage(case), pixel_stage(case)
    found = Diagnosis((ids, pixels, text_vector_stage(case, ids), image_vector_stage(case, pixels)))
    if all(stage.verdict in ("not given", "not compared") for stage in found.stages):
        notes = "; ".join(f"{stage.name}: {note}" for stage in found.stages for note in stage.notes)
        raise InputError("none of the answers can be compared", where=where, got=notes)
    return found
