"""The families: one line each. A family is imported when it is needed, not before."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module

from torch import Tensor

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, Family, TensorInfo
from vlm_export.text_display import shown

FAMILIES = {
    "clip": "vlm_export.models.clip:ClipFamily",
    "minicpmv": "vlm_export.models.minicpmv:MiniCpmVFamily",
    "omnilmm": "vlm_export.models.omnilmm:OmniLmmFamily",
    "blip": "vlm_export.models.blip:BlipFamily",
    "nanovlm": "vlm_export.models.nanovlm:NanoVlmFamily",
}


def load_family(name: str) -> Family:
    """The family of that name; KeyError when there is none."""
    module, _, cls = FAMILIES[name].partition(":")
    family: Family = getattr(import_module(module), cls)()
    return family


def recognise(checkpoint: Checkpoint) -> Family:
    """The family that the checkpoint belongs to; InputError when none claims it."""
    if family := _find(checkpoint):
        return family
    keys = list(checkpoint.tensors)
    raise InputError(
        "no family recognises this checkpoint",
        where=checkpoint.source,
        expected=f"the published key names of one of: {', '.join(FAMILIES)}",
        got=f"{len(keys)} tensors, the first: {', '.join(map(shown, keys[:5]))}",
        fix="a wrapper's prefix such as 'module.' or 'state_dict.' must be removed from the keys first",
    )


def read_prefixes(keys: Collection[str]) -> tuple[str, ...]:
    """Prefixes of the keys that the family of a checkpoint with these keys reads; () when it reads all, or none does.

    The families tell by names alone, so that an index is enough.
    """
    unread = TensorInfo((), "float32")
    family = _find(Checkpoint("", "safetensors", (), dict.fromkeys(keys, unread), _refuse))
    return family.reads if family else ()


def _find(checkpoint: Checkpoint) -> Family | None:
    return next((family for family in map(load_family, FAMILIES) if family.recognises(checkpoint)), None)


def _refuse(key: str) -> Tensor:
    raise AssertionError(f"nothing is read to recognise a family, not {key}")
