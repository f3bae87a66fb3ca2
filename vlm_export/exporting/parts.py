"""Which of a model's Parts an export makes, and the room that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from vlm_export.errors import UsageError, suggestion
from vlm_export.exporting.options import FP16
from vlm_export.exporting.preprocessing_part import PART_NAME, find_vision
from vlm_export.exporting.verification import HUGE_PART_BYTES
from vlm_export.family import Checkpoint, Family, Model, PartOutline
from vlm_export.proof.image_samples import takes_images
from vlm_export.specs.tasks import limited_tasks

_FLOAT32_BYTES = 4
_WEIGHT_BYTES = {"fp32": _FLOAT32_BYTES, "fp16": 2}


def select_parts(model: Model, names: Sequence[str]) -> Model:
    """The model with the named parts, in its own order; with all of them when no name is given.

    Raises:
        UsageError: the model has no part of a name.
    """
    check_names(names, [part.name for part in model.parts])
    parts = tuple(part for part in model.parts if not names or part.name in names)
    return replace(model, parts=parts, tasks=limited_tasks(model.tasks, [part.name for part in parts]))


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """UsageError where one of the names is no part's."""
    for name in names:
        if name not in known:
            fix = "add --with-preprocessing" if name == PART_NAME else suggestion(name, known)
            alone = f": {known[0]} is all that this checkpoint has" if len(known) == 1 else ""
            raise UsageError(f"the model has no part {name!r}{alone}", expected=", ".join(known), got=name, fix=fix)


def planned_parts(
    family: Family, checkpoint: Checkpoint, names: Sequence[str], with_preprocessing: bool
) -> tuple[PartOutline, ...]:
    """The parts that an export makes, known before minutes are spent on weights.

    Raises:
        UsageError: the checkpoint's model has no part of a name, or none that preprocessing can stand before, or the
            names leave out what `with_preprocessing` asks for.
    """
    parts = family.describe(checkpoint).parts
    if with_preprocessing:
        # The part with preprocessing holds the image encoder once more.
        parts = (*parts, replace(find_vision(parts), name=PART_NAME))
        if names and PART_NAME not in names:
            raise UsageError(
                f"--with-preprocessing adds the part {PART_NAME}, which --part leaves out",
                got=", ".join(names),
                fix=f"add --part {PART_NAME}, or leave --with-preprocessing out",
            )
    check_names(names, [part.name for part in parts])
    return tuple(part for part in parts if not names or part.name in names)


def check_images(parts: Sequence[PartOutline], images: Sequence[Path]) -> None:
    """UsageError where images are named and none of the parts starts from one."""
    if images and not any(takes_images(part.signature) for part in parts):
        raise UsageError(
            "no part of this export takes an image to verify with",
            got=", ".join(part.name for part in parts),
            fix="leave --image out, or export a part that takes images (--part)",
        )


def needed_bytes(
    family: Family, checkpoint: Checkpoint, parts: Sequence[PartOutline], precisions: Sequence[str] = ("fp32",)
) -> int:
    """Disk that an export takes at most: weights converted to float32, those of every graph at every precision, and
    for the proof of float16 those of one part in float32 again."""
    read = (info.shape for key, info in checkpoint.tensors.items() if not family.reads or key.startswith(family.reads))
    written = sum(part.parameter_count for part in parts)
    sizes = [_FLOAT32_BYTES * part.parameter_count for part in parts] if FP16 in precisions else []
    again = max((size for size in sizes if size <= HUGE_PART_BYTES), default=0)
    return _FLOAT32_BYTES * sum(map(prod, read)) + written * sum(_WEIGHT_BYTES[name] for name in precisions) + again
