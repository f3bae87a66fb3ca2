"""FG-CLIP 2: SigLIP 2's NaFlex, trained further on captions of regions in English and Chinese.

Its images and its short texts take the path of transformers' `Siglip2Model`, weight by weight, so that this class is
the Reference. Its authors make the letters of each caption lower case, as the tokenizer of that class does by itself.
Beside it stand positions and a layer for texts of up to 196 tokens (`walk_type="long"`), a layer for phrases about
regions (`walk_type="box"`) and a head for features of each patch. They are not exported.

Source: 360CVGroup/FG-CLIP (75badee), fgclip2/model/strcs/modeling_fgclip2.py, and fgclip2.py, whose class trains it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint, Description, Model, WeightStore
from vlm_export.models.reading.transformers_classes import READ_AS
from vlm_export.models.siglip.family import Siglip2Family
from vlm_export.models.siglip.weights import ROOTS

_MODEL_TYPE, _CLASS = "fgclip2", "Fgclip2Model"
_MARK = "longtext_head.weight"
_HEADS = ("longtext_head", "boxtext_head", "dense_feature_head")
_LONG_POSITIONS = tuple(f"text_model.embeddings.position_embedding_{part}.weight" for part in ("ori", "res"))
_LONG_SIZES = ("keep_len", "longtext_len")


class FgClip2Family(Siglip2Family):
    """The images and the short texts of `Fgclip2Model`, the class that checkpoints bring as code of their own."""

    name = "fgclip2"
    roots: tuple[str, ...] = (*ROOTS, *_HEADS)
    # The second is the class that trains it.
    config_types: Mapping[str, tuple[str, ...]] = {_MODEL_TYPE: (_CLASS, "FG_CLIP2_Model")}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return (checkpoint.config or {}).get("model_type") == _MODEL_TYPE or _MARK in checkpoint.tensors

    def describe(self, checkpoint: Checkpoint) -> Description:
        description = super().describe(_as_siglip2(checkpoint))
        note = "texts are read as short ones; long texts, phrases about regions and features of patches are left out"
        return replace(description, notes=(*description.notes, note))

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        model = super().build(_as_siglip2(checkpoint), store, options)
        return replace(model, dropped_keys=(*model.dropped_keys, *_not_exported(checkpoint)))

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        config = super().published_config(architecture) or {}
        return {**config, "model_type": _MODEL_TYPE, "architectures": [_CLASS]}


def _not_exported(checkpoint: Checkpoint) -> Iterator[str]:
    yield from (key for key in checkpoint.tensors if key.split(".")[0] in _HEADS or key in _LONG_POSITIONS)


def _as_siglip2(checkpoint: Checkpoint) -> Checkpoint:
    """The `Siglip2Model` in the checkpoint, with the config.json that transformers reads without further code."""
    dropped, config = set(_not_exported(checkpoint)), dict(checkpoint.config or {})
    for tower in ("text", "vision"):
        section = config.get(f"{tower}_config")
        if isinstance(section, Mapping):
            own = {key: value for key, value in section.items() if key not in _LONG_SIZES}
            config[f"{tower}_config"] = {**own, "model_type": f"{READ_AS[_MODEL_TYPE]}_{tower}_model"}
    return replace(
        checkpoint,
        tensors={key: info for key, info in checkpoint.tensors.items() if key not in dropped},
        config=config and {**config, "model_type": READ_AS[_MODEL_TYPE], "architectures": ["Siglip2Model"]},
    )
