"""CLIP's published keys → our parameters, for OpenAI's files and for Hugging Face's `CLIPModel`.

Sources: openai/CLIP model.py (d05afc4); transformers 5.23, models/clip/modeling_clip.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_export.models.layers.vit_weights import HUGGINGFACE_BLOCK, OPENAI_BLOCK
from vlm_export.models.reading.weights import Target, Transposed, WeightTable, prefixed, repeat

OPENAI_TEXT: WeightTable = {
    "token_embedding.weight": "text.token_embedding.weight",
    "positional_embedding": "text.position_embedding",
    "ln_final.weight": "text.norm.weight",
    "ln_final.bias": "text.norm.bias",
    "text_projection": "text.projection",
    "logit_scale": "logit_scale",
    # Sizes that TorchScript archives carry as 0-d integers; the shapes say the same.
    "input_resolution": None,
    "context_length": None,
    "vocab_size": None,
}
OPENAI_VIT: WeightTable = {
    "visual.class_embedding": "vision.class_embedding",
    "visual.positional_embedding": "vision.position_embedding",
    "visual.conv1.weight": "vision.patches.conv.weight",
    "visual.ln_pre.weight": "vision.norm_pre.weight",
    "visual.ln_pre.bias": "vision.norm_pre.bias",
    "visual.ln_post.weight": "vision.norm_post.weight",
    "visual.ln_post.bias": "vision.norm_post.bias",
    "visual.proj": "vision.projection",
}
BATCH_NORM: WeightTable = {
    "weight": "weight",
    "bias": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": None,
}
OPENAI_ATTENTION_POOL: WeightTable = {
    "positional_embedding": "position_embedding",
    "q_proj.weight": "q.weight",
    "q_proj.bias": "q.bias",
    "k_proj.weight": "k.weight",
    "k_proj.bias": "k.bias",
    "v_proj.weight": "v.weight",
    "v_proj.bias": "v.bias",
    "c_proj.weight": "out.weight",
    "c_proj.bias": "out.bias",
}
HF_HEADS: WeightTable = {
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.position_embedding",
    "text_model.final_layer_norm.weight": "text.norm.weight",
    "text_model.final_layer_norm.bias": "text.norm.bias",
    "text_projection.weight": Transposed("text.projection"),
    "vision_model.embeddings.class_embedding": "vision.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "vision.position_embedding",
    "vision_model.embeddings.patch_embedding.weight": "vision.patches.conv.weight",
    # "pre_layrnorm" is how the published files spell it.
    "vision_model.pre_layrnorm.weight": "vision.norm_pre.weight",
    "vision_model.pre_layrnorm.bias": "vision.norm_pre.bias",
    "vision_model.post_layernorm.weight": "vision.norm_post.weight",
    "vision_model.post_layernorm.bias": "vision.norm_post.bias",
    "visual_projection.weight": Transposed("vision.projection"),
    "logit_scale": "logit_scale",
    # Index buffers that older transformers versions saved.
    "text_model.embeddings.position_ids": None,
    "vision_model.embeddings.position_ids": None,
}


OPENAI_ROOTS = ("visual", "transformer", *(key.split(".", 1)[0] for key in OPENAI_TEXT), "text", "logit_bias")
HF_ROOTS = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale", "logit_bias")


def openai_vit_table(vision_layers: int, text_layers: int) -> dict[str, Target]:
    """OpenAI's key names, ViT image encoder."""
    vision = prefixed(OPENAI_BLOCK, "visual.transformer.resblocks.{i}.", "vision.blocks.{i}.")
    return {**OPENAI_VIT, **repeat(vision, vision_layers), **_openai_text_table(text_layers)}


def openai_resnet_table(stages: Sequence[int], text_layers: int) -> dict[str, Target]:
    """OpenAI's key names, ModifiedResNet image encoder."""
    return {**modified_resnet_table(stages), **_openai_text_table(text_layers)}


def modified_resnet_table(stages: Sequence[int]) -> dict[str, Target]:
    """The keys of the image encoder alone."""
    table: dict[str, Target] = {}
    for i in (1, 2, 3):
        table |= _convolution(f"visual.conv{i}", f"visual.bn{i}", f"vision.conv{i}", f"vision.bn{i}")
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            key, name = f"visual.layer{stage + 1}.{block}.", f"vision.stages.{stage}.{block}."
            for i in (1, 2, 3):
                table |= _convolution(f"{key}conv{i}", f"{key}bn{i}", f"{name}conv{i}", f"{name}bn{i}")
            if block == 0:
                down, ours = f"{key}downsample.", f"{name}downsample."
                table |= _convolution(f"{down}0", f"{down}1", f"{ours}1", f"{ours}2")
    return {**table, **prefixed(OPENAI_ATTENTION_POOL, "visual.attnpool.", "vision.attnpool.")}


def huggingface_table(vision_layers: int, text_layers: int) -> dict[str, Target]:
    """Key names of transformers' `CLIPModel`."""
    vision = prefixed(HUGGINGFACE_BLOCK, "vision_model.encoder.layers.{i}.", "vision.blocks.{i}.")
    text = prefixed(HUGGINGFACE_BLOCK, "text_model.encoder.layers.{i}.", "text.blocks.{i}.")
    return {**HF_HEADS, **repeat(vision, vision_layers), **repeat(text, text_layers)}


def tower_table(table: WeightTable, tower: str) -> dict[str, Target]:
    """The keys of one tower, "vision" or "text", and its projection."""
    prefixes = ("vision_model.", "visual_projection.") if tower == "vision" else ("text_model.", "text_projection.")
    return {key: target for key, target in table.items() if key.startswith(prefixes)}


def _openai_text_table(layers: int) -> dict[str, Target]:
    text = prefixed(OPENAI_BLOCK, "transformer.resblocks.{i}.", "text.blocks.{i}.")
    return {**OPENAI_TEXT, **repeat(text, layers)}


def _convolution(conv_key: str, norm_key: str, conv_name: str, norm_name: str) -> dict[str, Target]:
    return {
        f"{conv_key}.weight": f"{conv_name}.weight",
        **prefixed(BATCH_NORM, f"{norm_key}.", f"{norm_name}."),
    }
