"""AltCLIP: CLIP's image encoder beside XLM-R, whose state passes a norm and a layer before its projection.

Port of transformers 5.23 models/altclip/modeling_altclip.py. It has Chinese-CLIP's form otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vlm_export.family import Checkpoint
from vlm_export.models.chineseclip.architecture import LibraryNames
from vlm_export.models.chineseclip.family import ChineseClipFamily

# transformers 5 saves both encoders' layers as "layer", and has them as "layers" in memory (conversion_mapping.py).
_AS_PUBLISHED = {
    "vision_model.encoder.layer.": "vision_model.encoder.layers.",
    "text_model.roberta.encoder.layers.": "text_model.roberta.encoder.layer.",
}


class AltClipFamily(ChineseClipFamily):
    """transformers' `AltCLIPModel`."""

    name = "altclip"
    marks: tuple[str, ...] = ("text_model.transformation.weight",)
    library = LibraryNames(
        title="AltCLIP",
        model_type="altclip",
        class_name="AltCLIPModel",
        image_class="CLIPImageProcessor",
        text_prefix="text_model.roberta.",
        heads=16,
        eps=1e-5,
        vocabulary="XLM-R",
        end_token_id=2,
        pad_token_id=1,
        has_mapping=True,
        renamed=("text_model.roberta.encoder.layer.", "text_model.roberta.encoder.layers."),
    )
    config_types: Mapping[str, tuple[str, ...]] = {"altclip": ("AltCLIPModel",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        needed = {*self.marks, "vision_model.pre_layrnorm.weight", "text_model.roberta.embeddings.LayerNorm.weight"}
        return needed <= set(checkpoint.tensors)

    def with_published_names(self, checkpoint: Checkpoint) -> Checkpoint:
        keys = {_published_name(key): key for key in checkpoint.tensors}
        read = checkpoint.read
        return replace(
            checkpoint,
            tensors={name: checkpoint.tensors[key] for name, key in keys.items()},
            read=lambda name: read(keys[name]),
            computed=frozenset(map(_published_name, checkpoint.computed)),
        )


def _published_name(key: str) -> str:
    for written, published in _AS_PUBLISHED.items():
        key = key.replace(written, published)
    return key
