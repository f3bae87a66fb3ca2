"""The families: one line each. A family is imported when it is needed, not before."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module

from torch import Tensor

from vlm_export.family import Checkpoint, Family, StoredTensorInfo
from vlm_export.models.recognition.claims import claimed_by, error_from_unknown, refuse_other_models, seen_by

FAMILIES = {
    "openclip": "vlm_export.models.openclip.family:OpenClipFamily",
    "altclip": "vlm_export.models.chineseclip.altclip:AltClipFamily",
    "chineseclip": "vlm_export.models.chineseclip.family:ChineseClipFamily",
    "jinaclip": "vlm_export.models.jinaclip.family:JinaClipFamily",
    "metaclip2": "vlm_export.models.clip.metaclip2:MetaClip2Family",
    "clip": "vlm_export.models.clip.family:ClipFamily",
    "minicpmv": "vlm_export.models.minicpmv.family:MiniCpmVFamily",
    "omnilmm": "vlm_export.models.minicpmv.omnilmm:OmniLmmFamily",
    "blip": "vlm_export.models.blip.family:BlipFamily",
    "fgclip2": "vlm_export.models.siglip.fgclip2:FgClip2Family",
    "siglip2": "vlm_export.models.siglip.family:Siglip2Family",
    "siglip": "vlm_export.models.siglip.family:SiglipFamily",
    "nanovlm": "vlm_export.models.nanovlm.family:NanoVlmFamily",
}


def load_family(name: str) -> Family:
    """The family of that name; KeyError when there is none."""
    module, _, cls = FAMILIES[name].partition(":")
    family: Family = getattr(import_module(module), cls)()
    return family


def recognise(checkpoint: Checkpoint) -> Family:
    """The family of `identify`."""
    return identify(checkpoint)[0]


def identify(checkpoint: Checkpoint) -> tuple[Family, Checkpoint]:
    """The family that the checkpoint belongs to, and the checkpoint as the family reads it.

    A prefix that all keys of the model have is taken off them, and tensors of other modules beside it are left out;
    `Checkpoint.notes` and `Checkpoint.left_out` say so.

    Raises:
        InputError: no family computes this model. The error calls it by the name that config.json,
            `open_clip_config.json` or its key names give it.
    """
    families = _families()
    refuse_other_models(checkpoint, families)
    claim = claimed_by(families, checkpoint)
    if claim is None:
        raise error_from_unknown(checkpoint, families)
    return claim.family, seen_by(claim, checkpoint, families)


def read_prefixes(keys: Collection[str]) -> tuple[str, ...]:
    """Prefixes of the keys that the family of a checkpoint with these keys reads; () when it reads all, or none does.

    The families tell by names alone, so that an index is enough.
    """
    unread = StoredTensorInfo((), "float32")
    claim = claimed_by(_families(), Checkpoint("", "safetensors", (), dict.fromkeys(keys, unread), _refuse))
    return tuple(claim.prefix + name for name in claim.family.reads) if claim else ()


def _families() -> list[Family]:
    return [load_family(name) for name in FAMILIES]


def _refuse(key: str) -> Tensor:
    raise AssertionError(f"nothing is read to recognise a family, not {key}")
