"""config.json of transformers' dual encoders: a section for each of two towers, or all of it about the one there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.reading.shapes import config_section

TOWERS = ("vision", "text")
Value = TypeVar("Value")


def one_tower(checkpoint: Checkpoint) -> str | None:
    """ "vision" or "text" for a checkpoint of that tower alone, None for one of both."""
    model_type = str((checkpoint.config or {}).get("model_type"))
    return next((tower for tower in TOWERS if model_type.endswith(f"_{tower}_model")), None)


def section_name(checkpoint: Checkpoint, tower: str) -> str:
    """The section of config.json that is about a tower; "" where all of it is."""
    return "" if one_tower(checkpoint) else f"{tower}_config"


def tower_config(checkpoint: Checkpoint, tower: str) -> Mapping[str, Any] | None:
    """What config.json says of a tower, None where the checkpoint is the other one alone."""
    if alone := one_tower(checkpoint):
        return (checkpoint.config or {}) if tower == alone else None
    return config_section(checkpoint, f"{tower}_config")


def check_towers(checkpoint: Checkpoint, found: Sequence[str], model: str) -> None:
    """InputError when config.json is of other towers than the weights are.

    Args:
        found: the towers of which there are weights, in the order of `TOWERS`.
        model: what the checkpoint is called.
    """
    alone = one_tower(checkpoint)
    stated = list(TOWERS) if alone is None else [alone]
    if list(found) != stated:
        raise InputError(
            f"config.json and the weights are of different encoders of {model}",
            where=f"{checkpoint.source}: config.json: model_type",
            expected=f"that of the {' and the '.join(found)} encoder, as the weights are",
            got=f"that of the {' and the '.join(stated)} encoder",
            fix="take the config.json that was saved with these weights",
        )


def stated_alike(checkpoint: Checkpoint, key: str, stated: Sequence[Value]) -> Value:
    """What the vision and the text tower state alike; one tower states it alone."""
    vision, text = stated[0], stated[-1]
    if vision != text:
        raise InputError(
            f"the two towers disagree on {key}",
            where=f"{checkpoint.source}: config.json",
            got=f"vision {vision!r:.80}, text {text!r:.80}",
            fix="such a checkpoint is not supported; please report it",
        )
    return vision
