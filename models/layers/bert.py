"""BERT: encoder, and with cross-attention as BLIP uses it; decoder with a key-value cache.

Port of salesforce/BLIP models/med.py (3a29b74), valid for its checkpoints and for transformers' `BlipText*` (5.23):
no token types, norms after the residual sum, exact GELU. Token types and RoBERTa's positions:
transformers 5.23 models/{bert,roberta}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.models.layers.blocks import (
    MLP,
    CrossAttention,
    KeyValueProjection,
    MultiHeadAttention,
    cached_causal_mask,
    padding_mask,
)
from vlm_export.specs.codec import Spec


@dataclass(frozen=True)
class BertSizes(Spec):
    """Sizes of the text transformer.

    Attributes:
        positions: rows of the position table, the longest sequence.
        states_width: width of the states that cross-attention reads, 0 without cross-attention.
        eps: of every layer norm.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    vocab_size: int
    positions: int
    states_width: int
    eps: float


class BertEmbeddings(nn.Module):
    """input_ids int64 (B, T) → float32 (B, T, width): tokens plus learned positions, normalised.

    Args:
        sizes: of the text transformer.
        token_types: rows of the table of token types; the first is added, as for texts of one segment. 0: no table.
        padding_id: None where positions are counted from 0. RoBERTa counts tokens other than this one, from the row
            after it on, and gives this one, wherever it stands, the row of its own id.
    """

    def __init__(self, sizes: BertSizes, token_types: int = 0, padding_id: int | None = None) -> None:
        super().__init__()
        self.padding_id = padding_id
        self.word = nn.Embedding(sizes.vocab_size, sizes.width)
        self.position_embedding = nn.Parameter(torch.empty(sizes.positions, sizes.width))
        if token_types:
            self.token_type_embedding = nn.Parameter(torch.empty(token_types, sizes.width))
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)

    def forward(self, input_ids: Tensor, past_tokens: int = 0) -> Tensor:
        embedded: Tensor = self.word(input_ids) + self._positions(input_ids, past_tokens)
        if hasattr(self, "token_type_embedding"):
            embedded = embedded + self.token_type_embedding[0]
        normed: Tensor = self.norm(embedded)
        return normed

    def _positions(self, input_ids: Tensor, past_tokens: int) -> Tensor:
        if self.padding_id is None:
            return self.position_embedding.index_select(0, torch.arange(input_ids.shape[1]) + past_tokens)
        counted = (input_ids != self.padding_id).to(torch.int64)
        positions = torch.cumsum(counted, dim=1) * counted + self.padding_id
        return F.embedding(positions, self.position_embedding)


class BertLayer(nn.Module):
    """Self-attention and MLP; cross-attention, where there is any, comes between the two."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(sizes.width, sizes.heads)
        self.norm1 = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.mlp = MLP(sizes.width, sizes.hidden, "gelu")
        self.norm2 = nn.LayerNorm(sizes.width, eps=sizes.eps)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.norm1(x + self.attention(x, mask))
        return y

    def attend_cached(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.attention.step(x, mask, *past)
        y: Tensor = self.norm1(x + attended)
        return y, key, value

    def feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(x + self.mlp(x))
        return y


class BertCrossAttention(nn.Module):
    """norm(x + attention(x, keys and values))."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.attention = CrossAttention(sizes.width, sizes.heads)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x + self.attention(x, key, value, mask))
        return y


class Bert(nn.Module):
    """The weights of one text transformer; Parts take of them what they need. Arguments as in `BertEmbeddings`."""

    def __init__(self, sizes: BertSizes, token_types: int = 0, padding_id: int | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.embeddings = BertEmbeddings(sizes, token_types, padding_id)
        self.layers = nn.ModuleList(BertLayer(sizes) for _ in range(sizes.layers))
        cross_layers = sizes.layers if sizes.states_width else 0
        self.cross = nn.ModuleList(BertCrossAttention(sizes) for _ in range(cross_layers))
        # Apart from the rest of cross-attention: a decoder's graph has no use for them.
        self.keys_values = nn.ModuleList(
            KeyValueProjection(sizes.width, sizes.states_width, sizes.heads) for _ in range(cross_layers)
        )


class BertHead(nn.Module):
    """Hidden states to logits; the token embedding is the output matrix."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.bias = nn.Parameter(torch.empty(sizes.vocab_size))

    def forward(self, x: Tensor, word_embedding: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        # In two dimensions it exports as Gemm, which reads the embedding as it is stored.
        rows = self.norm(F.gelu(self.dense(x))).reshape(-1, width)
        return F.linear(rows, word_embedding, self.bias).reshape(-1, tokens, word_embedding.shape[0])


class TextEncoder(nn.Module):
    """input_ids, attention_mask int64 (B, T) → hidden states float32 (B, T, width); holds no cross-attention."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.embeddings, self.layers = bert.embeddings, bert.layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = padding_mask(attention_mask)
        x: Tensor = self.embeddings(input_ids)
        for layer in cast("Iterable[BertLayer]", self.layers):
            x = layer.feed_forward(layer.attend(x, mask))
        return x


class MultimodalEncoder(nn.Module):
    """As `TextEncoder`, and every layer attends to `encoder_hidden_states`: float32 (B, S, states_width)."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.embeddings, self.layers = bert.embeddings, bert.layers
        self.cross, self.keys_values = bert.cross, bert.keys_values

    def forward(self, input_ids: Tensor, attention_mask: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        mask = padding_mask(attention_mask)
        x: Tensor = self.embeddings(input_ids)
        layers = cast("Iterable[BertLayer]", self.layers)
        for layer, cross, keys_values in zip(layers, self.cross, self.keys_values, strict=True):
            key, value = keys_values(encoder_hidden_states)
            x = layer.feed_forward(cross(layer.attend(x, mask), key, value))
        return x


class CrossKeyValues(nn.Module):
    """encoder_hidden_states float32 (B, S, states_width) → key and value of each layer, float32 (B, H, S, d)."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.keys_values = bert.keys_values

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for project in self.keys_values for tensor in project(encoder_hidden_states))


class TextDecoder(nn.Module):
    """T new tokens after P cached ones, attending to S encoder states → logits and the grown cache.

    forward(input_ids int64 (B, T), attention_mask int64 (B, P + T), encoder_attention_mask int64 (B, S), then for each
    layer: past key and value float32 (B, H, P, d), encoder key and value float32 (B, H, S, d)) → logits float32
    (B, T, vocabulary), then for each layer key and value float32 (B, H, P + T, d).
    """

    def __init__(self, bert: Bert, head: BertHead) -> None:
        super().__init__()
        self.embeddings, self.layers, self.cross, self.head = bert.embeddings, bert.layers, bert.cross, head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, encoder_attention_mask: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        past_tokens, tokens = cache[0].shape[2], input_ids.shape[1]
        mask = cached_causal_mask(attention_mask, past_tokens, tokens)
        encoder_mask = padding_mask(encoder_attention_mask)
        x, present = self.embeddings(input_ids, past_tokens), list[Tensor]()
        layers = cast("Iterable[BertLayer]", self.layers)
        for i, (layer, cross) in enumerate(zip(layers, self.cross, strict=True)):
            past_key, past_value, encoder_key, encoder_value = cache[4 * i : 4 * i + 4]
            x, key, value = layer.attend_cached(x, mask, (past_key, past_value))
            x = layer.feed_forward(cross(x, encoder_key, encoder_value, encoder_mask))
            present += [key, value]
        return self.head(x, self.embeddings.word.weight), *present


def cache_names(layers: int, kinds: Sequence[str], prefix: str) -> tuple[str, ...]:
    """`<prefix>.<layer>.<kind>.key` and `.value` for each layer and kind, in the order of `TextDecoder`."""
    return tuple(f"{prefix}.{i}.{kind}.{what}" for i in range(layers) for kind in kinds for what in ("key", "value"))
