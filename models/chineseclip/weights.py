"""Chinese-CLIP's published keys → our parameters: CLIP's names for images, BERT's for texts.

Sources: OFA-Sys/Chinese-CLIP cn_clip/clip/model.py (release 1.6.0); transformers 5.23,
models/chinese_clip/modeling_chinese_clip.py.
"""

from __future__ import annotations

from vlm_export.models.chineseclip.architecture import ChineseClipArchitecture, LibraryNames
from vlm_export.models.clip.architecture import ResNetSizes
from vlm_export.models.clip.weights import (
    HF_ROOTS,
    huggingface_table,
    openai_resnet_table,
    openai_vit_table,
    tower_table,
)
from vlm_export.models.layers.bert_weights import bert_table
from vlm_export.models.reading.weights import Target, Transposed, WeightTable, prefixed

_MAPPING: WeightTable = {
    "text_model.pre_LN.weight": "text.norm.weight",
    "text_model.pre_LN.bias": "text.norm.bias",
    "text_model.transformation.weight": "text.mapping.weight",
    "text_model.transformation.bias": "text.mapping.bias",
}
ROOTS = ("visual", "bert", *HF_ROOTS)


def weight_table(architecture: ChineseClipArchitecture, library: LibraryNames) -> dict[str, Target]:
    """All keys of a checkpoint."""
    vision, text = architecture.vision, bert_table(architecture.text.layers)
    if architecture.key_names == "huggingface":
        assert not isinstance(vision, ResNetSizes)
        return {
            **tower_table(huggingface_table(vision.layers, 0), "vision"),
            **prefixed(text, library.text_prefix, "text.encoder."),
            **(_MAPPING if library.has_mapping else {}),
            "text_projection.weight": Transposed("text.projection"),
            "logit_scale": "logit_scale",
        }
    if isinstance(vision, ResNetSizes):
        images = openai_resnet_table(vision.stages, 0)
    else:
        images = openai_vit_table(vision.layers, 0)
    return {
        **{key: target for key, target in images.items() if key.startswith("visual.")},
        **prefixed(text, "bert.", "text.encoder."),
        # The authors' code leaves the pooler aside too (`create_model`): texts are read at [CLS] itself.
        "bert.pooler.dense.weight": None,
        "bert.pooler.dense.bias": None,
        "text_projection": "text.projection",
        "logit_scale": "logit_scale",
    }
