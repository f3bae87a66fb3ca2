"""MobileCLIP as Apple publishes it (`mobileclip_s1.pt`, `_s2`, `_b`, `_blt`): its key names, told in open_clip's.

Sources: open_clip 3.3.0, `convert_mobile_clip_state_dict` in convert.py; timm 1.0.31, `checkpoint_filter_fn` in
fastvit.py and vision_transformer_hybrid.py. The text encoder of MobileCLIP-S0 has convolutions: open_clip lacks it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vlm_export.family import Checkpoint, StoredTensorInfo

_IMAGE, _TEXT = "image_encoder.model.", "text_encoder."
_VIT_MARK = f"{_IMAGE}patch_emb.0.block.conv.weight"
_Pairs = tuple[tuple[str, str], ...]
_BLOCK: _Pairs = (("pre_norm_mha.0", "{ln_1}"), ("pre_norm_mha.1", "attn"), ("pre_norm_ffn.0", "{ln_2}"))
_TEXT_NAMES: _Pairs = (
    ("projection_layer", "text_projection"),
    ("embedding_layer", "token_embedding"),
    ("positional_embedding.pos_embed.pos_embed", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    *((old, new.format(ln_1="ln_1", ln_2="ln_2")) for old, new in _BLOCK),
    ("pre_norm_ffn.1", "mlp.c_fc"),
    ("pre_norm_ffn.4", "mlp.c_proj"),
    ("qkv_proj.weight", "in_proj_weight"),
    ("qkv_proj.bias", "in_proj_bias"),
    ("transformer.", "transformer.resblocks."),
)
_VIT_NAMES: _Pairs = (
    ("patch_emb.", "patch_embed.backbone."),
    ("block.conv", "conv"),
    ("block.norm", "bn"),
    ("post_transformer_norm.", "norm."),
    *((old, new.format(ln_1="norm1", ln_2="norm2")) for old, new in _BLOCK),
    ("pre_norm_ffn.1", "mlp.fc1"),
    ("pre_norm_ffn.4", "mlp.fc2"),
    ("qkv_proj.", "qkv."),
    ("out_proj.", "proj."),
    ("transformer.", "blocks."),
    ("pos_embed.pos_embed.pos_embed", "pos_embed"),
    ("classifier.proj", "head.weight"),
)
_FASTVIT_NAMES: _Pairs = (
    ("patch_embed", "stem"),
    ("rbr_conv", "conv_kxk"),
    ("rbr_scale", "conv_scale"),
    ("rbr_skip", "identity"),
    ("conv_exp", "final_conv"),
    ("lkb_origin", "large_conv"),
    ("convffn", "mlp"),
    ("se.reduce", "se.fc1"),
    ("se.expand", "se.fc2"),
    ("head.proj", "head.fc.weight"),
)
_NETWORK = re.compile(r"network\.(\d+)\.(proj\.|pe\.|)")
_LAYER_SCALE = re.compile(r"(layer_scale(_\d)?)$")


def is_apple(checkpoint: Checkpoint) -> bool:
    """Whether the keys are Apple's."""
    return (
        any(key.startswith(_IMAGE) for key in checkpoint.tensors) and f"{_TEXT}projection_layer" in checkpoint.tensors
    )


def with_open_clip_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with open_clip's keys; as it is where the keys are not Apple's.

    The projection of images is stored transposed and has no bias there: open_clip's is zero.
    """
    if not is_apple(checkpoint):
        return checkpoint
    stages = _stage_ends(tuple(checkpoint.tensors))
    names = {_renamed(key, stages, is_vit=_VIT_MARK in checkpoint.tensors): key for key in checkpoint.tensors}
    head = next((name for name in names if re.fullmatch(r"visual\.trunk\.head\.(fc\.)?weight", name)), None)
    tensors = {name: checkpoint.tensors[key] for name, key in names.items()}
    if head is None:
        return replace(checkpoint, tensors=tensors, read=lambda name: checkpoint.read(names[name]))
    shape = tuple(reversed(tensors[head].shape))
    bias = head.replace("weight", "bias")
    tensors |= {
        head: StoredTensorInfo(shape, tensors[head].dtype),
        bias: StoredTensorInfo(shape[:1], "float32"),
    }
    for name, ranks in (("text.positional_embedding", 2), ("visual.trunk.pos_embed", 3)):
        if name in tensors:
            tensors[name] = StoredTensorInfo(tensors[name].shape[-ranks:], tensors[name].dtype)
    return replace(
        checkpoint,
        tensors=tensors,
        read=partial(_read, checkpoint, names, tensors, head),
        computed=checkpoint.computed | {bias},
    )


def _read(
    checkpoint: Checkpoint, names: dict[str, str], tensors: dict[str, StoredTensorInfo], head: str, name: str
) -> Tensor:
    if name not in names:
        return torch.zeros(tensors[name].shape)
    stored = checkpoint.read(names[name])
    return stored.T if name == head else stored.reshape(tensors[name].shape)


def _stage_ends(keys: Sequence[str]) -> list[int]:
    """Where in the flat list of FastViT's modules the steps between stages are."""
    found = (_NETWORK.search(key) for key in keys if key.startswith(_IMAGE))
    return sorted({int(match[1]) for match in found if match and match[2] == "proj."})


def _renamed(key: str, stage_ends: list[int], *, is_vit: bool) -> str:
    if key.startswith(_TEXT):
        return f"text.{_replaced(key.removeprefix(_TEXT), _TEXT_NAMES)}"
    if not key.startswith(_IMAGE):
        return key
    name = key.removeprefix(_IMAGE)
    if is_vit:
        return f"visual.trunk.{_replaced(name, _VIT_NAMES)}"
    name = _LAYER_SCALE.sub(r"\1.gamma", _replaced(name, _FASTVIT_NAMES))
    if match := _NETWORK.match(name):
        kinds = {"proj.": "downsample.proj.", "pe.": "pos_emb.pos_enc.", "": "blocks."}
        stage = f"stages.{bisect_right(stage_ends, int(match[1]))}."
        name = stage + kinds[match[2]] + name[match.end() :]
    return f"visual.trunk.{name}"


def _replaced(name: str, pairs: _Pairs) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
