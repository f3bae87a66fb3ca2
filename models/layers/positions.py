"""Learned position embeddings at another grid of patches, with the exact semantics of each original.

| original | filter |
| --- | --- |
| transformers 5.23 `interpolate_pos_encoding` (CLIP, BLIP, ViT) | bicubic |
| BLIP `interpolate_pos_embed` (salesforce/BLIP models/vit.py, 3a29b74), at load time | bicubic |
| timm 1.0 `resample_abs_pos_embed` (SigLIP, EVA, ViT) | bicubic with antialiasing |

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
