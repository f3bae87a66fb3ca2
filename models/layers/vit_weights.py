"""timm's key names of vision transformers → `vit.VisionTransformer`'s parameters.

Sources: timm 0.4.12 and 1.0, models/vision_transformer.py (BLIP, SigLIP) and models/eva.py (EVA-02 enormous).
"""

from __future__ import annotations

from vlm_export.models.reading.weights import Rows, Target, Unsqueezed, WeightTable, prefixed, repeat

_STEM: WeightTable = {
    "pos_embed": Unsqueezed("position_embedding"),
    "patch_embed.proj.weight": "patches.conv.weight",
    "patch_embed.proj.bias": "patches.conv.bias",
    "norm.weight": "norm_post.weight",
    "norm.bias": "norm_post.bias",
}
_CLASS_TOKEN: WeightTable = {"cls_token": Unsqueezed("class_embedding", 2)}
_BLOCK: WeightTable = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.proj.weight": "attn.out.weight",
    "attn.proj.bias": "attn.out.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_QKV_BIAS: WeightTable = {"attn.qkv.bias": "attn.qkv.bias"}
# Keys have no bias in EVA; rows that no key fills stay zero.
_QV_BIAS: WeightTable = {
    "attn.q_bias": Rows("attn.qkv.bias", 0, 3),
    "attn.v_bias": Rows("attn.qkv.bias", 2, 3),
}

# A block of OpenAI's CLIP (d05afc4), as open_clip has it.
OPENAI_BLOCK: WeightTable = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.out.weight",
    "attn.out_proj.bias": "attn.out.bias",
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
}
# A block of transformers' CLIP and SigLIP classes (5.23).
HUGGINGFACE_BLOCK: WeightTable = {
    "self_attn.q_proj.weight": Rows("attn.qkv.weight", 0, 3),
    "self_attn.q_proj.bias": Rows("attn.qkv.bias", 0, 3),
    "self_attn.k_proj.weight": Rows("attn.qkv.weight", 1, 3),
    "self_attn.k_proj.bias": Rows("attn.qkv.bias", 1, 3),
    "self_attn.v_proj.weight": Rows("attn.qkv.weight", 2, 3),
    "self_attn.v_proj.bias": Rows("attn.qkv.bias", 2, 3),
    "self_attn.out_proj.weight": "attn.out.weight",
    "self_attn.out_proj.bias": "attn.out.bias",
    "layer_norm1.weight": "norm1.weight",
    "layer_norm1.bias": "norm1.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_norm2.weight": "norm2.weight",
    "layer_norm2.bias": "norm2.bias",
}


def vit_table(layers: int, *, has_class_token: bool) -> dict[str, Target]:
    """timm's `VisionTransformer` without a head."""
    stem = {**_STEM, **_CLASS_TOKEN} if has_class_token else dict(_STEM)
    return {**stem, **repeat(prefixed({**_BLOCK, **_QKV_BIAS}, "blocks.{i}.", "blocks.{i}."), layers)}


def eva_table(layers: int) -> dict[str, Target]:
    """timm's `Eva` with absolute positions, a class token and separate q and v biases, without a head."""
    block = prefixed({**_BLOCK, **_QV_BIAS}, "blocks.{i}.", "blocks.{i}.")
    return {**_STEM, **_CLASS_TOKEN, **repeat(block, layers)}
