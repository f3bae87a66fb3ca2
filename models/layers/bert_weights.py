"""BERT's key names → `bert.Bert`'s parameters; RoBERTa's are the same.

Sources: transformers 5.23, models/bert/modeling_bert.py and models/roberta/modeling_roberta.py.
"""

from __future__ import annotations

from vlm_export.models.reading.weights import Rows, Target, WeightTable, prefixed, repeat

BERT_EMBEDDINGS: WeightTable = {
    "embeddings.position_ids": None,
    "embeddings.position_embeddings.weight": "embeddings.position_embedding",
    "embeddings.LayerNorm.weight": "embeddings.norm.weight",
    "embeddings.LayerNorm.bias": "embeddings.norm.bias",
}
BERT_WORDS: WeightTable = {"embeddings.word_embeddings.weight": "embeddings.word.weight"}
BERT_LAYER: WeightTable = {
    "attention.self.query.weight": Rows("layers.{i}.attention.qkv.weight", 0, 3),
    "attention.self.query.bias": Rows("layers.{i}.attention.qkv.bias", 0, 3),
    "attention.self.key.weight": Rows("layers.{i}.attention.qkv.weight", 1, 3),
    "attention.self.key.bias": Rows("layers.{i}.attention.qkv.bias", 1, 3),
    "attention.self.value.weight": Rows("layers.{i}.attention.qkv.weight", 2, 3),
    "attention.self.value.bias": Rows("layers.{i}.attention.qkv.bias", 2, 3),
    "attention.output.dense.weight": "layers.{i}.attention.out.weight",
    "attention.output.dense.bias": "layers.{i}.attention.out.bias",
    "attention.output.LayerNorm.weight": "layers.{i}.norm1.weight",
    "attention.output.LayerNorm.bias": "layers.{i}.norm1.bias",
    "intermediate.dense.weight": "layers.{i}.mlp.fc1.weight",
    "intermediate.dense.bias": "layers.{i}.mlp.fc1.bias",
    "output.dense.weight": "layers.{i}.mlp.fc2.weight",
    "output.dense.bias": "layers.{i}.mlp.fc2.bias",
    "output.LayerNorm.weight": "layers.{i}.norm2.weight",
    "output.LayerNorm.bias": "layers.{i}.norm2.bias",
}
BERT_TOKEN_TYPES: WeightTable = {"embeddings.token_type_embeddings.weight": "embeddings.token_type_embedding"}


def bert_table(layers: int) -> dict[str, Target]:
    """An encoder with token types and without a pooler."""
    layer = prefixed(BERT_LAYER, "encoder.layer.{i}.", "")
    return {**BERT_EMBEDDINGS, **BERT_WORDS, **BERT_TOKEN_TYPES, **repeat(layer, layers)}
