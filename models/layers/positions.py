"""Learned position embeddings at another grid of patches, with the exact semantics of each original.

| original | filter |
| --- | --- |
| transformers 5.23 `interpolate_pos_encoding` (CLIP, BLIP, ViT) | bicubic |
| BLIP `interpolate_pos_embed` (salesforce/BLIP models/vit.py, 3a29b74), at load time | bicubic |
| timm 1.0 `resample_abs_pos_embed` (SigLIP, EVA, ViT) | bicubic with antialiasing |
| transformers 5.23 `resize_positional_embeddings` (SigLIP 2), for each image of a batch | bilinear with antialiasing |

All keep the prefix tokens and leave an embedding of the same grid as it is. The two filters differ also where nothing
shrinks: torch's cubic has the coefficient -0.75 without antialiasing and -0.5 with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_position_embedding(
    table: Tensor, grid: int, rows: int, columns: int, *, prefix_tokens: int = 1, antialias: bool = False
) -> Tensor:
    """The embedding for rows · columns patches.

    Args:
        table: float32 (prefix_tokens + grid², width), row by row.
        grid: patches per side that it was trained with.
        rows, columns: patches per side now.
        prefix_tokens: tokens before the patches, whose positions stay.
        antialias: timm's filter instead of transformers'.

    Returns:
        float32 (prefix_tokens + rows · columns, width).
    """
    prefix, positions = table[:prefix_tokens], table[prefix_tokens:]
    image = positions.reshape(1, grid, grid, table.shape[1]).permute(0, 3, 1, 2)
    resampled = F.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False, antialias=antialias)
    patches = resampled.permute(0, 2, 3, 1).reshape(-1, table.shape[1])
    return torch.cat([prefix, patches]) if prefix_tokens else patches


def positions_of_grids(table: Tensor, grid: int, shapes: Tensor, tokens: int) -> Tensor:
    """The embedding of each patch of images of several shapes; that of padding is the first patch's.

    The filter is a triangle in each direction (torch's `upsample_bilinear2d_aa`), so that a patch's position is a
    weighted sum over the table: one product of matrices for all images, whatever their shapes. For images one patch
    wide, the vertical pass of torch 2.15 on the CPU gives something else; here they are resampled as all others.

    Args:
        table: float32 (grid², width), row by row.
        shapes: int64 (B, 2), rows and columns of patches.
        tokens: L.

    Returns:
        float32 (B, L, width).
    """
    rows, columns = shapes[:, 0:1], shapes[:, 1:2]
    index = torch.arange(tokens)[None, :]
    index = index * (index < rows * columns).to(torch.int64)
    row = torch.div(index, columns, rounding_mode="floor")
    down, across = _triangle(row, rows, grid), _triangle(index - row * columns, columns, grid)
    weights = down.unsqueeze(-1) * across.unsqueeze(-2)
    return weights.reshape(-1, tokens, grid * grid) @ table


def _triangle(places: Tensor, count: Tensor, grid: int) -> Tensor:
    """float32 (B, L, grid): weights of the table's places for the place of a patch among `count` ones."""
    scale = grid / count.to(torch.float32).unsqueeze(-1)
    centre = scale * (places.to(torch.float32).unsqueeze(-1) + 0.5)
    distance = (torch.arange(grid).to(torch.float32) + 0.5 - centre).abs() / scale.clamp(min=1.0)
    weights = (1.0 - distance).clamp(min=0.0)
    return weights / weights.sum(dim=-1, keepdim=True)
