"""Which of a model's Parts an export makes, and the room that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from vlm_export.errors import UsageError, suggestion
from vlm_export.export.preprocessing_part import PART_NAME
from vlm_export.family import Checkpoint, Family, Model

_FLOAT32_BYTES = 4
_WEIGHT_BYTES = {"fp32": _FLOAT32_BYTES, "fp16": 2}


def select_parts(model: Model, names: Sequence[str]) -> Model:
    """The model with the named parts, in its own order; with all of them when no name is given.

    Raises:
        UsageError: the model has no part of a name.
    """
    check_names(names, [part.name for part in model.parts])
    return replace(model, parts=tuple(part for part in model.parts if not names or part.name in names))


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """UsageError where one of the names is no part's."""
    for name in names:
        if name not in known:
            raise UsageError(
                f"the model has no part {name!r}", expected=", ".join(known), got=name, fix=suggestion(name, known)
            )


def needed_bytes(
    family: Family,
    checkpoint: Checkpoint,
    names: Sequence[str],
    with_preprocessing: bool,
    precisions: Sequence[str] = ("fp32",),
) -> int:
    """Disk that an export takes at most: weights converted to float32, and those of every graph at every precision.

    The part with preprocessing holds the picture encoder once more.

    Raises:
        UsageError: the checkpoint's model has no part of a name; found here, before minutes are spent on its weights.
    """
    read = (info.shape for key, info in checkpoint.tensors.items() if not family.reads or key.startswith(family.reads))
    counts = {part.name: part.parameter_count for part in family.describe(checkpoint).parts}
    if with_preprocessing and "vision" in counts:
        counts[PART_NAME] = counts["vision"]
    check_names(names, list(counts))
    written = sum(count for name, count in counts.items() if not names or name in names)
    return _FLOAT32_BYTES * sum(map(prod, read)) + written * sum(_WEIGHT_BYTES[name] for name in precisions)
