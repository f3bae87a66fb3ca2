"""SigLIP for pictures of any shape, packed as rows of patches: the image encoder of MiniCPM-V 2.5 to 4.5.

Ports of openbmb/MiniCPM-Llama3-V-2_5 (Idefics2's encoder) and MiniCPM-V-2_6 modeling_navit_siglip.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlm_export.models.layers import PatchEmbedding, TransformerBlock, padding_mask

EPS = 1e-6
# Patches per side up to which places are exact: the longest picture of the published slicing has 32 · 32 patches.
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class NavitSizes:
    """Sizes; `grid` is the position table's number of places per side."""

    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    grid: int


class NavitEncoder(nn.Module):
    """pixel_values float32 (B, 3, p, p·L), patches side by side, zero-padded; tgt_sizes int64 (B, 2), rows and columns
    of patches → tokens float32 (B, L, width); those of padding mean nothing."""

    bounds: Tensor

    def __init__(self, sizes: NavitSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patches = PatchEmbedding(sizes.width, sizes.patch_size, bias=True)
        self.position_embedding = nn.Parameter(torch.empty(sizes.grid**2, sizes.width))
        self.register_buffer("bounds", bucket_bounds(sizes.grid), persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(sizes.width, sizes.heads, sizes.hidden, "gelu_tanh", EPS) for _ in range(sizes.layers)
        )
        self.norm_post = nn.LayerNorm(sizes.width, eps=EPS)

    def forward(self, pixel_values: Tensor, tgt_sizes: Tensor) -> Tensor:
        x = self.patches(pixel_values)
        ids = bucketed_positions(tgt_sizes, x.shape[1], self.bounds)
        x = x + self.position_embedding.index_select(0, ids.flatten()).reshape(-1, x.shape[1], self.sizes.width)
        mask = padding_mask(patch_mask(tgt_sizes, x.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        tokens: Tensor = self.norm_post(x)
        return tokens


def patch_mask(tgt_sizes: Tensor, tokens: int) -> Tensor:
    """int64 (B, L): 1 for the first rows · columns tokens of each picture, 0 for padding."""
    count = tgt_sizes[:, 0:1] * tgt_sizes[:, 1:2]
    return (torch.arange(tokens)[None, :] < count).to(torch.int64)


def patch_places(tgt_sizes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """int64 (B, L) twice: row and column of each patch in its own grid; padding counts on."""
    index, columns = torch.arange(tokens)[None, :], tgt_sizes[:, 1:2]
    row = torch.div(index, columns, rounding_mode="floor")
    return row, index - row * columns


def bucket_bounds(grid: int) -> Tensor:
    """float32 (grid - 1,): where each bucket but the first begins, as the original computes it."""
    # On the CPU also under meta, and never in a graph: runtimes round a range of floats in their own ways.
    return torch.arange(1 / grid, 1.0, 1 / grid, device="cpu")


def bucketed_positions(tgt_sizes: Tensor, tokens: int, bounds: Tensor) -> Tensor:
    """int64 (B, L): the entry of the position table for each patch, 0 for padding.

    A patch at row i of h lies in the last bucket that begins at or before i / h. The original computes both
    in float32, where i / h is i times the rounded inverse: not what i · grid // h gives.
    """
    row, column = patch_places(tgt_sizes, tokens)
    bucket_row, bucket_column = (
        _bucket(place, count, bounds) for place, count in ((row, tgt_sizes[:, 0:1]), (column, tgt_sizes[:, 1:2]))
    )
    return (bucket_row * (bounds.shape[0] + 1) + bucket_column) * patch_mask(tgt_sizes, tokens)


def _bucket(places: Tensor, count: Tensor, bounds: Tensor) -> Tensor:
    # Looked up, since runtimes differ in how they divide.
    inverses = np.ones(LARGEST_SIDE + 1, np.float32)
    inverses[1:] = (1.0 / np.arange(1, LARGEST_SIDE + 1)).astype(np.float32)
    inverse = torch.from_numpy(inverses).index_select(0, count.flatten()).unsqueeze(1)
    fractions = places.to(torch.float32) * inverse
    return (bounds <= fractions.unsqueeze(-1)).to(torch.int64).sum(dim=-1)
