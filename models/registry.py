"""The families: one line each. A family is imported when it is needed, not before."""

from __future__ import annotations

from importlib import import_module

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, Family

FAMILIES = {
    "clip": "vlm_export.models.clip:ClipFamily",
    "minicpmv": "vlm_export.models.minicpmv:MiniCpmVFamily",
    "omnilmm": "vlm_export.models.minicpmv:OmniLmmFamily",
    "blip": "vlm_export.models.blip:BlipFamily",
}


def load_family(name: str) -> Family:
    """The family of that name; KeyError when there is none."""
    module, _, cls = FAMILIES[name].partition(":")
    family: Family = getattr(import_module(module), cls)()
    return family


def recognise(checkpoint: Checkpoint) -> Family:
    """The family that the checkpoint belongs to; InputError when none claims it."""
    for name in FAMILIES:
        family = load_family(name)
        if family.recognises(checkpoint):
            return family
    keys = list(checkpoint.tensors)
    raise InputError(
        "no family recognises this checkpoint",
        where=checkpoint.source,
        expected=f"the published key names of one of: {', '.join(FAMILIES)}",
        got=f"{len(keys)} tensors, the first: {', '.join(keys[:5])}",
        fix="a wrapper's prefix such as 'module.' or 'state_dict.' must be removed from the keys first",
    )
