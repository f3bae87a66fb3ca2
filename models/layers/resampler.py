"""The resampler of MiniCPM-V and OmniLMM: learned queries attend once to the image tokens.

Ports, valid for the versions named: OpenBMB/OmniLMM omnilmm/model/resampler.py (08ae772) for OmniLMM and MiniCPM-V 1.0;
openbmb/MiniCPM-V-2 resampler.py for 2.0; MiniCPM-Llama3-V-2_5 and MiniCPM-V-2_6 resampler.py for 2.5 to 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import CrossAttention, padding_mask
from vlm_export.models.layers.positions import resample_position_embedding
from vlm_export.specs.codec import Spec

Positions = Literal["stored", "grid"]
EPS = 1e-6


@dataclass(frozen=True)
class ResamplerSizes(Spec):
    """Sizes and choices.

    Attributes:
        queries: Q, tokens per image for the language model.
        width: D of the language model.
        heads: of the attention; 128 wide each in the published files.
        states_width: C of the image tokens.
        positions: of the keys: the stored square table resized ("stored": OmniLMM, MiniCPM-V 1.0), or sine and cosine
            of row and column ("grid": 2.0 and later).
        query_positions: the stored table is added to the queries (up to 2.0).
    """

    queries: int
    width: int
    heads: int
    states_width: int
    positions: Positions
    query_positions: bool


class Resampler(nn.Module):
    """Image tokens float32 (B, L, C) → float32 (B, Q, D)."""

    def __init__(self, sizes: ResamplerSizes) -> None:
        super().__init__()
        width = sizes.width
        self.sizes = sizes
        self.query = nn.Parameter(torch.empty(sizes.queries, width))
        if sizes.query_positions:
            self.position_embedding = nn.Parameter(torch.empty(sizes.queries, width))
        if sizes.states_width != width:
            self.kv_projection = nn.Linear(sizes.states_width, width, bias=False)
        self.norm_q, self.norm_kv = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.attn = CrossAttention(width, sizes.heads)
        self.norm_post = nn.LayerNorm(width, eps=EPS)
        self.projection = nn.Parameter(torch.empty(width, width))

    def forward(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """tokens: float32 (B, L, C); positions: float32 (L, D) or (B, L, D), of the keys alone; attention_mask: int64
        (B, L), 1 for patches and 0 for padding."""
        sizes = self.sizes
        values = self.norm_kv(self.kv_projection(tokens) if sizes.states_width != sizes.width else tokens)
        query = self.norm_q(self.query)
        if sizes.query_positions:
            query = query + self.position_embedding
        key, value = self._split(self.key(values + positions)), self._split(self.value(values))
        mask = None if attention_mask is None else padding_mask(attention_mask)
        attended = self.attn(query.expand(tokens.shape[0], -1, -1), key, value, mask)
        resampled: Tensor = self.norm_post(attended) @ self.projection
        return resampled

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.sizes.heads, self.sizes.width // self.sizes.heads).transpose(1, 2)

    def grid_positions(self, rows: int, columns: int) -> Tensor:
        """float32 (rows · columns, D) of the keys of one grid, which all images of the batch share."""
        if self.sizes.positions == "grid":
            row = torch.arange(rows).unsqueeze(1).expand(rows, columns).reshape(-1)
            column = torch.arange(columns).unsqueeze(0).expand(rows, columns).reshape(-1)
            return sine_positions(row, column, self.sizes.width)
        side = round(self.sizes.queries**0.5)
        return resample_position_embedding(self.position_embedding, side, rows, columns, prefix_tokens=0)


def sine_positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Sines and cosines of places in a grid: the first half of the width tells the column, the second the row.

    Args:
        rows, columns: int64 (..., L).

    Returns:
        float32 (..., L, width), as `get_2d_sincos_pos_embed` of the originals, whose frequencies are float32.
    """
    return torch.cat([sine_waves(columns, width // 2), sine_waves(rows, width // 2)], dim=-1)


def sine_waves(places: Tensor, width: int) -> Tensor:
    """Sines, then cosines of places on a line: int64 (..., L) → float32 (..., L, width)."""
    exponents = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    frequencies = torch.from_numpy((1.0 / 10000**exponents).astype(np.float32))
    angles = places.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
