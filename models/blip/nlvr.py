"""BLIP for pairs of images (NLVR): whether a sentence is true of two images.

Port of salesforce/BLIP models/nlvr_encoder.py and blip_nlvr.py (7662411).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.models.layers.bert import Bert, BertLayer, BertSizes
from vlm_export.models.layers.blocks import CrossAttention, KeyValueProjection, padding_mask

# From this layer on the two images' results are merged by a learned matrix; before, they are averaged.
FIRST_MERGING_LAYER = 6


class TwinCrossAttention(nn.Module):
    """norm(x + what x finds in two images), each with projections of its own."""

    def __init__(self, sizes: BertSizes, merges: bool) -> None:
        super().__init__()
        width = sizes.width
        self.attention0, self.attention1 = (CrossAttention(width, sizes.heads) for _ in range(2))
        self.keys_values0, self.keys_values1 = (
            KeyValueProjection(width, sizes.states_width, sizes.heads) for _ in range(2)
        )
        self.merge = nn.Linear(2 * width, width) if merges else None
        self.norm = nn.LayerNorm(width, eps=sizes.eps)

    def forward(self, x: Tensor, states0: Tensor, states1: Tensor) -> Tensor:
        found0 = self.attention0(x, *self.keys_values0(states0))
        found1 = self.attention1(x, *self.keys_values1(states1))
        both = (found0 + found1) / 2 if self.merge is None else self.merge(torch.cat([found0, found1], dim=-1))
        y: Tensor = self.norm(both + x)
        return y


class PairOfImagesText(nn.Module):
    """Text that attends to two images → logits float32 (B, 2), 1 is "true".

    forward(input_ids, attention_mask int64 (B, T), encoder_hidden_states_0 and _1 float32 (B, S, states_width)).
    """

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        bert = Bert(replace(sizes, states_width=0))
        self.embeddings, self.layers = bert.embeddings, bert.layers
        self.twins = nn.ModuleList(TwinCrossAttention(sizes, i >= FIRST_MERGING_LAYER) for i in range(sizes.layers))
        self.head1, self.head2 = nn.Linear(sizes.width, sizes.width), nn.Linear(sizes.width, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states_0: Tensor,
        encoder_hidden_states_1: Tensor,
    ) -> Tensor:
        mask = padding_mask(attention_mask)
        x: Tensor = self.embeddings(input_ids)
        for layer, twin in zip(self.layers, self.twins, strict=True):
            assert isinstance(layer, BertLayer)
            x = layer.feed_forward(twin(layer.attend(x, mask), encoder_hidden_states_0, encoder_hidden_states_1))
        logits: Tensor = self.head2(F.relu(self.head1(x[:, 0])))
        return logits
