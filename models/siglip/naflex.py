"""SigLIP 2's NaFlex image encoder: patches of images of any shape, several shapes in one batch.

Source: transformers 5.23, models/siglip2/modeling_siglip2.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlm_export.errors import InputError
from vlm_export.family import Array
from vlm_export.models.layers.blocks import TransformerBlock, padding_mask
from vlm_export.models.layers.positions import positions_of_grids
from vlm_export.models.siglip.architecture import NaflexChoices, NaflexSizes, SiglipArchitecture
from vlm_export.models.siglip.pooling import AttentionPoolingHead
from vlm_export.specs.patches import MASK, PATCH_INPUTS, PIXELS, SHAPES, PatchSpec
from vlm_export.specs.signature import Axis, Signature, TensorSpec

# Four times the area that the published processors make of an image.
LARGEST_PATCHES = 1024
# With fewer, images that are hardly taller than wide become one patch wide and several high.
LEAST_PATCHES = 6


class NaflexVisionTransformer(nn.Module):
    """Patches to image_embeds float32 (B, D), not normalised.

    pixel_values float32 (B, L, p · p · 3), normalised patches and padding; pixel_attention_mask int64 (B, L), 1 for
    patches of the image; spatial_shapes int64 (B, 2), rows and columns of patches, at most L.
    """

    def __init__(self, architecture: SiglipArchitecture, sizes: NaflexSizes) -> None:
        super().__init__()
        width, eps = sizes.width, architecture.eps
        self.grid = sizes.grid
        self.patches = nn.Linear(3 * sizes.patch_size**2, width)
        self.position_embedding = nn.Parameter(torch.empty(sizes.grid**2, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, sizes.heads, sizes.hidden, architecture.activation, eps)
            for _ in range(sizes.layers)
        )
        self.norm_post = nn.LayerNorm(width, eps=eps)
        self.head = AttentionPoolingHead(width, sizes.heads, sizes.hidden, architecture)

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        positions = positions_of_grids(self.position_embedding, self.grid, spatial_shapes, pixel_values.shape[1])
        x, mask = self.patches(pixel_values) + positions, padding_mask(pixel_attention_mask)
        for block in self.blocks:
            x = block(x, mask)
        embeds: Tensor = self.head(self.norm_post(x), mask)
        return embeds


def check_patches(spec: PatchSpec, choices: NaflexChoices) -> None:
    """InputError where the processor makes more patches of an image than the graph takes, or too few to prove it.

    A single patch is no column, and is resampled as it should be.
    """
    if 1 < spec.max_patches < LEAST_PATCHES:
        raise InputError(
            "with so few patches usual images become one patch wide, and torch resamples the positions of such images "
            "otherwise than those of all others (a defect of torch 2.15 on the CPU): nothing would prove the export",
            where="max_num_patches of the image processor",
            expected=f"at least {LEAST_PATCHES}",
            got=str(spec.max_patches),
            fix="state more patches in a copy of the checkpoint's processor file; published ones make 256",
        )
    limit = choices.fixed_patches or LARGEST_PATCHES
    if spec.max_patches > limit:
        raise InputError(
            "the image processor makes more patches of an image than the graph would take",
            where="max_num_patches of the image processor",
            expected=f"at most {limit}, {'fixed_patches' if choices.fixed_patches else 'the largest number'}",
            got=str(spec.max_patches),
            fix="state fewer in a copy of the checkpoint's processor file, or more with --set fixed_patches=L",
        )


def naflex_signature(sizes: NaflexSizes, output: TensorSpec, fixed_patches: int | None) -> Signature:
    """`fixed_patches`: L, for graphs without it as an axis."""
    length, axes = (fixed_patches, ()) if fixed_patches else ("patches", (Axis("patches", 1, LARGEST_PATCHES),))
    shapes = {PIXELS: ("batch", length, 3 * sizes.patch_size**2), MASK: ("batch", length), SHAPES: ("batch", 2)}
    inputs = [TensorSpec(name, "float32" if name == PIXELS else "int64", shapes[name]) for name in PATCH_INPUTS]
    return Signature(tuple(inputs), (output,), (Axis("batch"), *axes))


@dataclass(frozen=True)
class NaflexExamples:
    """Normal noise as patches of grids of any shape that fits, another one in each row; the first is all of its row.

    None is one patch wide and many high: there torch (2.15) does not resample the original's positions as elsewhere.
    """

    signature: Signature

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        _, length, width = (sizes.get(str(axis), axis) for axis in self.signature.inputs[0].shape)
        rows = rng.integers(1, max(int(length) // 2, 1) + 1, sizes["batch"])
        columns = rng.integers(np.minimum(2, int(length) // rows), int(length) // rows + 1)
        rows[0], columns[0] = 1, length
        pixels = rng.standard_normal((len(rows), int(length), int(width))).astype(np.float32)
        mask = (np.arange(length) < (rows * columns)[:, None]).astype(np.int64)
        return {PIXELS: pixels * mask[:, :, None].astype(np.float32), MASK: mask, SHAPES: np.stack([rows, columns], 1)}
