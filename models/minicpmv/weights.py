"""Published keys of MiniCPM-V's and OmniLMM's vision modules → our parameters.

Sources: openbmb/MiniCPM-V-2 (84ce9b0 of HwwwwwwwH's copy), MiniCPM-Llama3-V-2_5, MiniCPM-V-2_6; OpenBMB/OmniLMM
(08ae772).
"""

from __future__ import annotations

from vlm_export.models.layers.vit_weights import HUGGINGFACE_BLOCK, vit_table
from vlm_export.models.reading.weights import Stacked, Target, WeightTable, prefixed, repeat

_RESAMPLER: WeightTable = {
    "query": "query",
    "proj": "projection",
    "attn.in_proj_weight": Stacked(("attn.q.weight", "key.weight", "value.weight")),
    "attn.in_proj_bias": Stacked(("attn.q.bias", "key.bias", "value.bias")),
    "attn.out_proj.weight": "attn.out.weight",
    "attn.out_proj.bias": "attn.out.bias",
    "ln_q.weight": "norm_q.weight",
    "ln_q.bias": "norm_q.bias",
    "ln_kv.weight": "norm_kv.weight",
    "ln_kv.bias": "norm_kv.bias",
    "ln_post.weight": "norm_post.weight",
    "ln_post.bias": "norm_post.bias",
}
_NAVIT: WeightTable = {
    "embeddings.patch_embedding.weight": "patches.conv.weight",
    "embeddings.patch_embedding.bias": "patches.conv.bias",
    "embeddings.position_embedding.weight": "position_embedding",
    "post_layernorm.weight": "norm_post.weight",
    "post_layernorm.bias": "norm_post.bias",
}


def resampler_table(*, has_projection: bool, has_positions: bool) -> dict[str, Target]:
    """`resampler.*`; without a `kv_proj` where image tokens are as wide as the language model."""
    optional: dict[str, Target] = {"kv_proj.weight": "kv_projection.weight"} if has_projection else {}
    if has_positions:
        optional["pos_embed"] = "position_embedding"
    return {**_RESAMPLER, **optional}


def siglip_table(layers: int) -> dict[str, Target]:
    """timm's SigLIP of MiniCPM-V 1.0 and 2.0."""
    return vit_table(layers, has_class_token=False)


def navit_table(layers: int) -> dict[str, Target]:
    """SigLIP-NaViT of MiniCPM-V 2.5 and later."""
    return {**_NAVIT, **repeat(prefixed(HUGGINGFACE_BLOCK, "encoder.layers.{i}.", "blocks.{i}."), layers)}


def vision_table(vision: WeightTable, resampler: WeightTable, vision_prefix: str, prefix: str) -> dict[str, Target]:
    """Both modules under the published prefixes."""
    return {**prefixed(vision, vision_prefix, "vision."), **prefixed(resampler, f"{prefix}resampler.", "resampler.")}
