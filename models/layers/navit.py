"""SigLIP for images of any shape, packed as rows of patches: the image encoder of MiniCPM-V 2.5 to 4.5.

Ports of openbmb/MiniCPM-Llama3-V-2_5 (Idefics2's encoder) and MiniCPM-V-2_6 modeling_navit_siglip.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import PatchEmbedding, TransformerBlock, padding_mask
from vlm_export.specs.codec import Spec

PatchPositions = Literal["grid", "row"]
EPS = 1e-6
# Patches in one row: four times those of a square slice, beyond which the runtime refuses to cut.
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class NavitSizes(Spec):
    """Sizes and one choice.

    Attributes:
        grid: the position table's number of places per side.
        positions: "grid" places patches by row and column (2.6 and later); "row" lays all patches of an image side by
            side, in the table's first row, as 2.5 does, whose code does not pass the grid to the encoder.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    grid: int
    positions: PatchPositions = "grid"
    kind: Literal["navit"] = "navit"


class NavitEncoder(nn.Module):
    """pixel_values float32 (B, 3, p, p·L), patches side by side, zero-padded; tgt_sizes int64 (B, 2), rows and columns
    of patches → tokens float32 (B, L, width); those of padding mean nothing."""

    starts: Tensor

    def __init__(self, sizes: NavitSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patches = PatchEmbedding(sizes.width, sizes.patch_size, bias=True)
        self.position_embedding = nn.Parameter(torch.empty(sizes.grid**2, sizes.width))
        self.register_buffer("starts", bucket_starts(sizes.grid), persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(sizes.width, sizes.heads, sizes.hidden, "gelu_tanh", EPS) for _ in range(sizes.layers)
        )
        self.norm_post = nn.LayerNorm(sizes.width, eps=EPS)

    def forward(self, pixel_values: Tensor, tgt_sizes: Tensor) -> Tensor:
        x = self.patches(pixel_values)
        grids = tgt_sizes if self.sizes.positions == "grid" else one_row(tgt_sizes)
        ids = bucketed_positions(grids, x.shape[1], self.starts)
        x = x + self.position_embedding.index_select(0, ids.flatten()).reshape(-1, x.shape[1], self.sizes.width)
        mask = padding_mask(patch_mask(tgt_sizes, x.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        tokens: Tensor = self.norm_post(x)
        return tokens


def one_row(tgt_sizes: Tensor) -> Tensor:
    """int64 (B, 2): the same number of patches in one row; a grid of one row stays as it is."""
    count = tgt_sizes[:, 0:1] * tgt_sizes[:, 1:2]
    return torch.cat([torch.ones_like(count), count], dim=1)


def patch_mask(tgt_sizes: Tensor, tokens: int) -> Tensor:
    """int64 (B, L): 1 for the first rows · columns tokens of each image, 0 for padding."""
    count = tgt_sizes[:, 0:1] * tgt_sizes[:, 1:2]
    return (torch.arange(tokens)[None, :] < count).to(torch.int64)


def patch_places(tgt_sizes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """int64 (B, L) twice: row and column of each patch in its own grid; padding counts on."""
    index, columns = torch.arange(tokens)[None, :], tgt_sizes[:, 1:2]
    row = torch.div(index, columns, rounding_mode="floor")
    return row, index - row * columns


@cache
def bucket_starts(grid: int) -> Tensor:
    """float32 (LARGEST_SIDE + 1, grid - 1): by number of patches in a row, the first that lies in each later bucket.

    Patch i of n lies in the last bucket that begins at or before i / n. The originals compute the fractions with
    `torch.arange(0, 1 - 1e-6, 1 / n)` and where buckets begin with `torch.arange(1 / grid, 1, 1 / grid)`, and their
    roundings decide where both meet: the bucket is neither i * grid // n nor what i times the rounded 1 / n gives.
    """
    # Made here and not in a graph: runtimes round in their own ways. On the CPU also under meta. For some grids
    # (3, 6, 7, 14, …) arange rounds up its number of values and ends with 1.0, which no fraction reaches.
    bounds = torch.arange(1 / grid, 1.0, 1 / grid, device="cpu").numpy()[: grid - 1]
    starts = np.zeros((LARGEST_SIDE + 1, grid - 1), np.float32)
    for count in range(1, LARGEST_SIDE + 1):
        starts[count] = np.searchsorted(_fractions(count), bounds)
    return torch.from_numpy(starts)


def _fractions(count: int) -> npt.NDArray[np.float32]:
    """`torch.arange(0, 1 - 1e-6, 1 / count)`, bit by bit, as x86 computes it: whole pairs of eight from their eight's
    first value, rounded to float32, the rest alone."""
    index, step = np.arange(count), np.float64(np.float32(1) / np.float32(count))
    first = np.where(index < count // 16 * 16, index // 8 * 8, index)
    fractions: npt.NDArray[np.float32] = ((first * step).astype(np.float32) + (index - first) * step).astype(np.float32)
    return fractions


def bucketed_positions(tgt_sizes: Tensor, tokens: int, starts: Tensor) -> Tensor:
    """int64 (B, L): the entry of the position table for each patch, 0 for padding; `starts` as `bucket_starts`."""
    row, column = patch_places(tgt_sizes, tokens)
    bucket_row, bucket_column = (
        _bucket(place, count, starts) for place, count in ((row, tgt_sizes[:, 0]), (column, tgt_sizes[:, 1]))
    )
    return (bucket_row * (starts.shape[1] + 1) + bucket_column) * patch_mask(tgt_sizes, tokens)


def _bucket(places: Tensor, count: Tensor, starts: Tensor) -> Tensor:
    begun = starts.index_select(0, count).unsqueeze(1) <= places.to(torch.float32).unsqueeze(-1)
    return begun.to(torch.int64).sum(dim=-1)
