"""Jina CLIP's text encoders: BERT's layers with ALiBi and a gated MLP, or with rotary positions; the tokens' mean.

Ports of jinaai/jina-bert-flash-implementation (b78d159) mha.py, mlp.py and modeling_bert.py, for `mlp_type` glu without
`use_qk_norm`; of jinaai/xlm-roberta-flash-implementation mha.py, rotary.py and modeling_xlm_roberta.py, which
transformers 5.23 has as models/jina_embeddings_v3; and of HFTextEncoder in jinaai/jina-clip-implementation hf_model.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.models.jinaclip.architecture import JinaTextSizes
from vlm_export.models.layers.blocks import MLP, MultiHeadAttention, padding_mask
from vlm_export.models.layers.rotary_decoder import rotated


def alibi_slopes(heads: int) -> Tensor:
    """float32 (H): how fast each head's scores fall with the distance (arXiv:2108.12409).

    Powers of one ratio; for a number of heads that is no power of two, the next lower one's, and then every second one
    of the next higher one's.
    """
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(heads - whole)]
    # On the CPU also where the module around it is built on the meta device: no checkpoint supplies it.
    return torch.tensor(slopes, device="cpu")


class RotaryAttention(MultiHeadAttention):
    """Self-attention whose queries and keys are turned by their positions."""

    def attend(self, x: Tensor, mask: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: float32 (B, T, width); mask: added to the scores; turns: cosines and signed sines (T, d), or None."""
        q, k, v = self._split(x)
        if turns is not None:
            q, k = rotated(q, *turns), rotated(k, *turns)
        return self._mix(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class GatedGelu(nn.Module):
    """down(gelu(gate(x)) · up(x)); gate and up are one matrix without a bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down.in_features
        both: Tensor = self.gate_up(x)
        y: Tensor = self.down(F.gelu(both.narrow(2, 0, hidden)) * both.narrow(2, hidden, hidden))
        return y


class TextLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, sizes: JinaTextSizes) -> None:
        super().__init__()
        self.attention = RotaryAttention(sizes.width, sizes.heads)
        self.norm1 = nn.LayerNorm(sizes.width, eps=sizes.eps)
        is_bert = sizes.kind == "jina-bert"
        self.mlp = GatedGelu(sizes.width, sizes.hidden) if is_bert else MLP(sizes.width, sizes.hidden, "gelu")
        self.norm2 = nn.LayerNorm(sizes.width, eps=sizes.eps)

    def forward(self, x: Tensor, mask: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        x = self.norm1(x + self.attention.attend(x, mask, turns))
        y: Tensor = self.norm2(x + self.mlp(x))
        return y


class JinaText(nn.Module):
    """input_ids int64 (B, T) → text_embeds float32 (B, D), not normalised; the padding's id is not seen."""

    inv_freq: Tensor
    slopes: Tensor

    def __init__(self, sizes: JinaTextSizes, embed_dim: int) -> None:
        super().__init__()
        self.pad_id, self.embed_dim = sizes.pad_id, embed_dim
        self.word = nn.Embedding(sizes.vocab_size, sizes.width)
        self.token_type_embedding = nn.Parameter(torch.empty(sizes.token_types, sizes.width))
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.layers = nn.ModuleList(TextLayer(sizes) for _ in range(sizes.layers))
        self.is_rotary = sizes.rotary_base > 0
        if self.is_rotary:
            d = sizes.width // sizes.heads
            exponents = torch.arange(0, d, 2, device="cpu").to(torch.float32) / d
            self.register_buffer("inv_freq", 1.0 / sizes.rotary_base**exponents, persistent=False)
        else:
            self.register_buffer("slopes", alibi_slopes(sizes.heads), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        seen = (input_ids != self.pad_id).to(torch.int64)
        x: Tensor = self.norm(self.word(input_ids) + self.token_type_embedding[0])
        mask, turns = padding_mask(seen), None
        positions = torch.arange(input_ids.shape[1]).to(torch.float32)
        if self.is_rotary:
            angles = positions[:, None] * self.inv_freq
            cos, sin = angles.cos(), angles.sin()
            turns = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        else:
            distances = (positions[None, :] - positions[:, None]).abs()
            mask = mask - distances * self.slopes[:, None, None]
        for layer in cast("Iterable[TextLayer]", self.layers):
            x = layer(x, mask, turns)
        weights = seen.to(x.dtype).unsqueeze(-1)
        embeds = (x * weights).sum(dim=1) / weights.sum(dim=1)
        return embeds[:, : self.embed_dim]
