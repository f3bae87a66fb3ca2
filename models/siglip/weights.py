"""SigLIP's published keys → our parameters. Source: transformers 5.23, models/siglip/modeling_siglip.py."""

from __future__ import annotations

from dataclasses import replace

from vlm_export.family import Checkpoint
from vlm_export.models.layers.vit_weights import HUGGINGFACE_BLOCK
from vlm_export.models.reading.weights import Stacked, Target, Transposed, Unsqueezed, WeightTable, prefixed, repeat
from vlm_export.models.siglip.architecture import NaflexSizes, SiglipArchitecture

_HEAD: WeightTable = {
    "probe": "probe",
    "attention.in_proj_weight": Stacked(("attention.q.weight", "states.k.weight", "states.v.weight")),
    "attention.in_proj_bias": Stacked(("attention.q.bias", "states.k.bias", "states.v.bias")),
    "attention.out_proj.weight": "attention.out.weight",
    "attention.out_proj.bias": "attention.out.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_VISION: WeightTable = {
    "embeddings.patch_embedding.weight": "patches.conv.weight",
    "embeddings.patch_embedding.bias": "patches.conv.bias",
    "embeddings.position_embedding.weight": "position_embedding",
    "post_layernorm.weight": "norm_post.weight",
    "post_layernorm.bias": "norm_post.bias",
    **prefixed(_HEAD, "head.", "head."),
    # An index buffer that older transformers versions saved.
    "embeddings.position_ids": None,
}
_PATCHES: WeightTable = {
    "embeddings.patch_embedding.weight": "patches.weight",
    "embeddings.patch_embedding.bias": "patches.bias",
}
_TEXT: WeightTable = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "position_embedding",
    "final_layer_norm.weight": "norm.weight",
    "final_layer_norm.bias": "norm.bias",
    "head.weight": Transposed("projection"),
    "head.bias": "projection_bias",
    "embeddings.position_ids": None,
}
_SCORE: WeightTable = {"logit_scale": Unsqueezed("logit_scale"), "logit_bias": Unsqueezed("logit_bias")}
# First parts of the keys of one tower, as transformers 5 saves it alone; before, they had the tower's prefix there too.
_OF_ONE_TOWER = ("embeddings", "encoder", "post_layernorm", "final_layer_norm", "head")
ROOTS = ("vision_model", "text_model", "logit_scale", "logit_bias", *_OF_ONE_TOWER)
VISION_MARK, TEXT_MARK = "vision_model.head.probe", "text_model.head.weight"


def weight_table(architecture: SiglipArchitecture) -> dict[str, Target]:
    """Key names of transformers' class of both towers, for those that are there."""
    table: dict[str, Target] = {}
    for tower, sizes, stem in (("vision", architecture.vision, _VISION), ("text", architecture.text, _TEXT)):
        if sizes is not None:
            blocks = repeat(prefixed(HUGGINGFACE_BLOCK, "encoder.layers.{i}.", "blocks.{i}."), sizes.layers)
            if isinstance(sizes, NaflexSizes):
                stem = {**stem, **_PATCHES}
            table |= prefixed({**stem, **blocks}, f"{tower}_model.", f"{tower}.")
    if architecture.vision is not None and architecture.text is not None:
        table |= _SCORE
    return table


def tower_of_plain_names(checkpoint: Checkpoint) -> str | None:
    """The tower whose keys have no prefix, None where they have it."""
    keys = checkpoint.tensors
    if {"head.probe", "embeddings.patch_embedding.weight"} <= set(keys):
        return "vision"
    if {"head.weight", "final_layer_norm.weight", "embeddings.token_embedding.weight"} <= set(keys):
        return "text"
    return None


def with_tower_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of one tower under the names that it has beside the other one; others as they are."""
    tower = tower_of_plain_names(checkpoint)
    if tower is None:
        return checkpoint
    prefix, read = f"{tower}_model.", checkpoint.read
    return replace(
        checkpoint,
        tensors={prefix + key: info for key, info in checkpoint.tensors.items()},
        read=lambda key: read(key.removeprefix(prefix)),
        computed=frozenset(prefix + key for key in checkpoint.computed),
    )
