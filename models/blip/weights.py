"""BLIP's published keys → our parameters, for Salesforce's files and for transformers' BLIP classes.

Sources: salesforce/BLIP models/{vit,med,blip*}.py (3a29b74); transformers 5.23, models/blip/modeling_blip*.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.models.layers.bert_weights import BERT_EMBEDDINGS, BERT_LAYER, BERT_WORDS
from vlm_export.models.layers.vit_weights import vit_table
from vlm_export.models.reading.weights import Target, Unsqueezed, WeightTable, prefixed, repeat

_CROSS: WeightTable = {
    "crossattention.self.query.weight": "cross.{i}.attention.q.weight",
    "crossattention.self.query.bias": "cross.{i}.attention.q.bias",
    "crossattention.self.key.weight": "keys_values.{i}.k.weight",
    "crossattention.self.key.bias": "keys_values.{i}.k.bias",
    "crossattention.self.value.weight": "keys_values.{i}.v.weight",
    "crossattention.self.value.bias": "keys_values.{i}.v.bias",
    "crossattention.output.dense.weight": "cross.{i}.attention.out.weight",
    "crossattention.output.dense.bias": "cross.{i}.attention.out.bias",
    "crossattention.output.LayerNorm.weight": "cross.{i}.norm.weight",
    "crossattention.output.LayerNorm.bias": "cross.{i}.norm.bias",
}
_HEAD: WeightTable = {
    "cls.predictions.transform.dense.weight": "decoder_head.dense.weight",
    "cls.predictions.transform.dense.bias": "decoder_head.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "decoder_head.norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "decoder_head.norm.bias",
}
# Tied in the model, stored twice. The original loads them in this order, so the last of each pair counts.
_TIED = (
    (("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"), "decoder.embeddings.word.weight"),
    (("cls.predictions.bias", "cls.predictions.decoder.bias"), "decoder_head.bias"),
)
PROJECTIONS: WeightTable = {
    "vision_proj.weight": "vision_projection.weight",
    "vision_proj.bias": "vision_projection.bias",
    "text_proj.weight": "text_projection.weight",
    "text_proj.bias": "text_projection.bias",
}
_TWIN: WeightTable = {
    "crossattention.self{t}.query.weight": "twins.{i}.attention{t}.q.weight",
    "crossattention.self{t}.query.bias": "twins.{i}.attention{t}.q.bias",
    "crossattention.self{t}.key.weight": "twins.{i}.keys_values{t}.k.weight",
    "crossattention.self{t}.key.bias": "twins.{i}.keys_values{t}.k.bias",
    "crossattention.self{t}.value.weight": "twins.{i}.keys_values{t}.v.weight",
    "crossattention.self{t}.value.bias": "twins.{i}.keys_values{t}.v.bias",
    "crossattention.output.dense{t}.weight": "twins.{i}.attention{t}.out.weight",
    "crossattention.output.dense{t}.bias": "twins.{i}.attention{t}.out.bias",
}
_TWIN_NORM: WeightTable = {
    "crossattention.output.LayerNorm.weight": "twins.{i}.norm.weight",
    "crossattention.output.LayerNorm.bias": "twins.{i}.norm.bias",
}
_TWIN_MERGE: WeightTable = {
    "crossattention.output.merge_layer.weight": "twins.{i}.merge.weight",
    "crossattention.output.merge_layer.bias": "twins.{i}.merge.bias",
}
_PAIR_HEAD: WeightTable = {
    "cls_head.0.weight": "pair.head1.weight",
    "cls_head.0.bias": "pair.head1.bias",
    "cls_head.2.weight": "pair.head2.weight",
    "cls_head.2.bias": "pair.head2.bias",
}
MATCHING: WeightTable = {"itm_head.weight": "matching.weight", "itm_head.bias": "matching.bias"}
_HF_VISION: WeightTable = {
    "embeddings.class_embedding": Unsqueezed("class_embedding", 2),
    "embeddings.position_embedding": Unsqueezed("position_embedding"),
    "embeddings.patch_embedding.weight": "patches.conv.weight",
    "embeddings.patch_embedding.bias": "patches.conv.bias",
    "post_layernorm.weight": "norm_post.weight",
    "post_layernorm.bias": "norm_post.bias",
}
_HF_VISION_LAYER: WeightTable = {
    "layer_norm1.weight": "norm1.weight",
    "layer_norm1.bias": "norm1.bias",
    "self_attn.qkv.weight": "attn.qkv.weight",
    "self_attn.qkv.bias": "attn.qkv.bias",
    "self_attn.projection.weight": "attn.out.weight",
    "self_attn.projection.bias": "attn.out.bias",
    "layer_norm2.weight": "norm2.weight",
    "layer_norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
# What training leaves in a file: momentum copies, queues of negatives, the temperature of the loss.
_TRAINING_PREFIXES = ("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.")
_TRAINING_KEYS = ("temp", "image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr", "logit_scale")


ROOTS = (
    *("visual_encoder", "vision_model", "text_encoder", "text_decoder"),
    *("vision_proj", "text_proj", "itm_head", "cls_head"),
    *(prefix.rstrip(".") for prefix in _TRAINING_PREFIXES),
    *_TRAINING_KEYS,
)
"""First parts of all keys of BLIP."""


def vision_table(layers: int, *, huggingface: bool) -> dict[str, Target]:
    """The image encoder."""
    if not huggingface:
        return prefixed(vit_table(layers, has_class_token=True), "visual_encoder.", "vision.")
    layer = prefixed(_HF_VISION_LAYER, "encoder.layers.{i}.", "blocks.{i}.")
    return prefixed({**_HF_VISION, **repeat(layer, layers)}, "vision_model.", "vision.")


def encoder_table(layers: int, *, has_cross_attention: bool) -> dict[str, Target]:
    """`text_encoder`."""
    return prefixed({**BERT_WORDS, **_bert(layers, has_cross_attention)}, "text_encoder.", "encoder.")


def pair_table(layers: int, first_merging_layer: int) -> dict[str, Target]:
    """`text_encoder` and `cls_head` of checkpoints for pairs of images (NLVR)."""
    twins = repeat(_TWIN, 2, "{t}") | dict(_TWIN_NORM)
    table: dict[str, Target] = dict(BERT_WORDS) | _bert(layers, False)
    for i in range(layers):
        layer = {**twins, **_TWIN_MERGE} if i >= first_merging_layer else twins
        table |= repeat(prefixed(layer, "encoder.layer.{i}.", ""), 1, "{i}", first=i)
    return prefixed(table, "text_encoder.", "pair.") | dict(_PAIR_HEAD)


def decoder_table(layers: int, keys: Iterable[str]) -> dict[str, Target]:
    """`text_decoder`; of tied weights, whichever copy the checkpoint has."""
    stored = set(keys)
    table: dict[str, Target] = prefixed(_bert(layers, True), "bert.", "decoder.") | dict(_HEAD)
    for names, target in _TIED:
        present = [name for name in names if f"text_decoder.{name}" in stored] or list(names)
        table |= dict.fromkeys(present[:-1]) | {present[-1]: target}
    return prefixed(table, "text_decoder.", "")


def check_tied(checkpoint: Checkpoint) -> None:
    """InputError when a Hugging Face file holds two different tensors where the model has one.

    Salesforce's loader lets the last one count, transformers would not tie them; both are the same in honest files.
    """
    for names, _ in _TIED:
        present = [f"text_decoder.{name}" for name in names if f"text_decoder.{name}" in checkpoint.tensors]
        if len(present) == 2 and not torch.equal(*map(checkpoint.read, present)):
            raise InputError(
                "the decoder's output matrix or bias is not tied",
                where=checkpoint.source,
                expected=f"{present[0]} and {present[1]} equal",
                got="different values",
                fix="BLIP ties them; a model trained without tie_word_embeddings is not supported",
            )


def training_leftovers(keys: Iterable[str]) -> dict[str, Target]:
    """Keys of the file that only training needs, as dropped on purpose."""
    return {key: None for key in keys if key.startswith(_TRAINING_PREFIXES) or key in _TRAINING_KEYS}


def _bert(layers: int, has_cross_attention: bool) -> dict[str, Target]:
    layer = {**BERT_LAYER, **_CROSS} if has_cross_attention else BERT_LAYER
    return {**BERT_EMBEDDINGS, **repeat(prefixed(layer, "encoder.layer.{i}.", ""), layers)}
