"""open_clip's published keys → our parameters. Source: open_clip 3.3.0, model.py and transformer.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.models.clip.weights import OPENAI_VIT, modified_resnet_table
from vlm_export.models.layers.vit_weights import OPENAI_BLOCK
from vlm_export.models.openclip.config import OpenClipArchitecture
from vlm_export.models.openclip.hf_text import hf_encoder, hf_text_table
from vlm_export.models.openclip.towers import OpenClipEncoders
from vlm_export.models.reading.weights import Stacked, Target, Transposed, WeightTable, prefixed, repeat

BIAS_KEY = "logit_bias"
TEXT_MARKS = ("token_embedding.weight", "text.token_embedding.weight")
_TEXT: WeightTable = {
    "token_embedding.weight": "token_embedding.weight",
    "positional_embedding": "position_embedding",
    "ln_final.weight": "norm.weight",
    "ln_final.bias": "norm.bias",
}
_SCALES: WeightTable = {"ls_1.gamma": "scale1", "ls_2.gamma": "scale2"}
_POOLER: WeightTable = {
    "query": "query",
    "ln_q.weight": "norm_query.weight",
    "ln_q.bias": "norm_query.bias",
    "ln_k.weight": "norm_states.weight",
    "ln_k.bias": "norm_states.bias",
    "attn.in_proj_bias": Stacked(("attention.q.bias", "keys_values.k.bias", "keys_values.v.bias")),
    "attn.out_proj.weight": "attention.out.weight",
    "attn.out_proj.bias": "attention.out.bias",
}
_PACKED: WeightTable = {
    "attn.in_proj_weight": Stacked(("attention.q.weight", "keys_values.k.weight", "keys_values.v.weight"))
}
# nn.MultiheadAttention keeps them apart where keys have another width than queries.
_APART: WeightTable = {
    "attn.q_proj_weight": "attention.q.weight",
    "attn.k_proj_weight": "keys_values.k.weight",
    "attn.v_proj_weight": "keys_values.v.weight",
}


def text_prefix(keys: Iterable[str]) -> str:
    """What the text encoder's keys begin with: "text." in a `CustomTextCLIP`, nothing in a `CLIP`.

    open_clip reads either class from the keys of a `CLIP`: `convert_to_custom_text_state_dict`.
    """
    return "text." if any(key.startswith("text.") for key in keys) else ""


def weight_table(architecture: OpenClipArchitecture, encoders: OpenClipEncoders, prefix: str) -> dict[str, Target]:
    """Every key of a checkpoint, whose text encoder's keys begin with `prefix`."""
    table: dict[str, Target] = {"logit_scale": "logit_scale"}
    if architecture.init_logit_bias is not None:
        table[BIAS_KEY] = "logit_bias"
    table |= _vision_table(architecture, encoders.vision)
    # Sizes that OpenAI's archives carry as 0-d integers.
    table |= {"input_resolution": None, "context_length": None, "vocab_size": None}
    return {**table, **prefixed(_text_table(architecture), prefix, "text.")}


def _vision_table(architecture: OpenClipArchitecture, vision: nn.Module) -> dict[str, Target]:
    config = architecture.vision_cfg
    if config.timm_model_name:
        return {
            f"visual.{name}": None if name.endswith("num_batches_tracked") else f"vision.{name}"
            for name in vision.state_dict()
        }
    if isinstance(config.layers, tuple):
        return modified_resnet_table(config.layers)
    blocks = prefixed(
        _block(config.ls_init_value is not None), "visual.transformer.resblocks.{i}.", "vision.blocks.{i}."
    )
    table = {**OPENAI_VIT, **repeat(blocks, config.layers)}
    if config.no_ln_pre:
        table = {key: target for key, target in table.items() if not key.startswith("visual.ln_pre.")}
    if config.attentional_pool:
        weights = _PACKED if config.width == architecture.embed_dim else _APART
        table |= prefixed({**_POOLER, **weights}, "visual.attn_pool.", "vision.pooler.")
        table |= prefixed({"weight": "weight", "bias": "bias"}, "visual.ln_post.", "vision.pooler.norm.")
    return table


def _text_table(architecture: OpenClipArchitecture) -> Mapping[str, Target]:
    config = architecture.text_cfg
    if (encoder := hf_encoder(architecture)) is not None:
        return hf_text_table(encoder, architecture)
    blocks = prefixed(_block(config.ls_init_value is not None), "transformer.resblocks.{i}.", "blocks.{i}.")
    table = {**_TEXT, **repeat(blocks, config.layers)}
    if config.proj_type != "none" and config.proj_bias:
        table |= {"text_projection.weight": Transposed("projection"), "text_projection.bias": "projection_bias"}
    elif config.proj_type != "none":
        table["text_projection"] = "projection"
    return table


def _block(layer_scale: bool) -> WeightTable:
    return {**OPENAI_BLOCK, **_SCALES} if layer_scale else OPENAI_BLOCK


def with_zero_bias(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the bias that `load_checkpoint` of open_clip (factory.py) puts where a file has none."""
    read = checkpoint.read
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, BIAS_KEY: StoredTensorInfo((), "float32")},
        read=lambda key: torch.zeros(()) if key == BIAS_KEY else read(key),
        computed=checkpoint.computed | {BIAS_KEY},
    )
