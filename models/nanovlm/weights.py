"""nanoVLM's key names → our parameters. Source: huggingface/nanoVLM; the same from v0.1 (6ba9082) to 4e0c096."""

from __future__ import annotations

import torch

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.layers.rotary_decoder import RotaryDecoderSizes
from vlm_export.models.reading.weights import Rows, Target, Unsqueezed, WeightTable, prefixed, repeat

EMBEDDING_KEY, HEAD_KEY = "decoder.token_embedding.weight", "decoder.head.weight"
_VISION: WeightTable = {
    "patch_embedding.position_embedding": Unsqueezed("position_embedding"),
    "patch_embedding.conv.weight": "patches.conv.weight",
    "patch_embedding.conv.bias": "patches.conv.bias",
    "layer_norm.weight": "norm_post.weight",
    "layer_norm.bias": "norm_post.bias",
}
_VISION_BLOCK: WeightTable = {
    "ln1.weight": "norm1.weight",
    "ln1.bias": "norm1.bias",
    "attn.qkv_proj.weight": "attn.qkv.weight",
    "attn.qkv_proj.bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.out.weight",
    "attn.out_proj.bias": "attn.out.bias",
    "ln2.weight": "norm2.weight",
    "ln2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_DECODER: WeightTable = {
    "rotary_embd.inv_freq": "rotary.inv_freq",
    "norm.weight": "norm.weight",
}


def weight_table(
    vision_layers: int, sizes: RotaryDecoderSizes, stored: frozenset[str] = frozenset()
) -> dict[str, Target]:
    """All keys of a checkpoint.

    Args:
        stored: its keys, if there is a file: of a tied matrix it has either name, or both. safetensors keeps the
            head's and notes the other in its metadata.
    """
    vision = {**_VISION, **repeat(prefixed(_VISION_BLOCK, "blocks.{i}.", "blocks.{i}."), vision_layers)}
    decoder = {**_DECODER, **repeat(prefixed(_block(sizes), "blocks.{i}.", "blocks.{i}."), sizes.layers)}
    return {
        **prefixed(vision, "vision_encoder.", "vision."),
        "MP.proj.weight": "projection.weight",
        **prefixed(decoder, "decoder.", "decoder."),
        **_matrices(sizes.tied, stored),
    }


def check_tied(checkpoint: Checkpoint) -> None:
    """InputError when the config says that one matrix serves as both, and the file holds two different ones."""
    if not {EMBEDDING_KEY, HEAD_KEY} <= set(checkpoint.tensors):
        return
    if not torch.equal(checkpoint.read(EMBEDDING_KEY), checkpoint.read(HEAD_KEY)):
        raise InputError(
            "config.json ties the head to the token embedding, but the file holds two different tensors",
            where=f"{checkpoint.source}: lm_tie_weights",
            expected=f"{EMBEDDING_KEY} and {HEAD_KEY} equal, or lm_tie_weights false",
            got="different values",
            fix="set lm_tie_weights to false in config.json if the model was trained with two matrices",
        )


def _matrices(tied: bool, stored: frozenset[str]) -> dict[str, Target]:
    if not tied:
        return {EMBEDDING_KEY: "decoder.embedding.weight", HEAD_KEY: "decoder.head.weight"}
    if HEAD_KEY in stored or EMBEDDING_KEY not in stored:
        return {EMBEDDING_KEY: None, HEAD_KEY: "decoder.embedding.weight"}
    return {EMBEDDING_KEY: "decoder.embedding.weight"}


def _block(sizes: RotaryDecoderSizes) -> dict[str, Target]:
    """One layer; queries, keys and values are packed, in blocks of a head's rows."""
    heads, kv_heads = sizes.heads, sizes.kv_heads
    packed = heads + 2 * kv_heads
    return {
        "norm1.weight": "norm1.weight",
        "norm2.weight": "norm2.weight",
        "attn.q_proj.weight": Rows("attn.qkv.weight", 0, packed, heads),
        "attn.k_proj.weight": Rows("attn.qkv.weight", heads, packed, kv_heads),
        "attn.v_proj.weight": Rows("attn.qkv.weight", heads + kv_heads, packed, kv_heads),
        "attn.out_proj.weight": "attn.out.weight",
        "mlp.gate_proj.weight": "mlp.gate.weight",
        "mlp.up_proj.weight": "mlp.up.weight",
        "mlp.down_proj.weight": "mlp.down.weight",
    }
