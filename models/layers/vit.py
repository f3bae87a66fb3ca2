"""The vision transformer that the families share: patches, positions, blocks, final norm.

One module for what the published encoders are: OpenAI's and Hugging Face's CLIP (norm before the blocks), timm's ViT
as BLIP has it, timm's SigLIP (no class token), timm's EVA-02 enormous (norms after each branch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import Activation, PatchEmbedding, PostNormBlock, TransformerBlock
from vlm_export.models.layers.positions import resample_position_embedding
from vlm_export.models.reading.weights import origins_of, set_origins
from vlm_export.specs.codec import Spec


@dataclass(frozen=True)
class VitForm(Spec):
    """Sizes and choices of a vision transformer.

    Attributes:
        grid: patches per side that the position embedding was trained with.
        eps: of every layer norm.
        has_class_token: the first token is a learned one, with a position of its own.
        patch_bias: the patch convolution has a bias.
        norm_first: a norm between positions and blocks (CLIP).
        post_norm: x + norm(branch(x)) instead of x + branch(norm(x)) (EVA-02 enormous).
        antialias: positions of another grid are resampled as timm does, with antialiasing; else as transformers does.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch_size: int
    grid: int
    activation: Activation = "gelu"
    eps: float = 1e-6
    has_class_token: bool = True
    patch_bias: bool = True
    norm_first: bool = False
    post_norm: bool = False
    antialias: bool = False
    kind: Literal["vit"] = "vit"


class VisionTransformer(nn.Module):
    """pixel_values float32 (B, 3, H, W), H and W multiples of the patch size → tokens float32 (B, [1 +] P, width)."""

    def __init__(self, form: VitForm) -> None:
        super().__init__()
        width = form.width
        self.form, self.grid = form, form.grid
        self.dynamic_image_size = False
        self.patches = PatchEmbedding(width, form.patch_size, bias=form.patch_bias)
        if form.has_class_token:
            self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(form.grid**2 + form.has_class_token, width))
        if form.norm_first:
            self.norm_pre = nn.LayerNorm(width, eps=form.eps)
        block = PostNormBlock if form.post_norm else TransformerBlock
        self.blocks = nn.ModuleList(
            block(width, form.heads, form.hidden, form.activation, form.eps) for _ in range(form.layers)
        )
        self.norm_post = nn.LayerNorm(width, eps=form.eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.norm_post(self.encode(pixel_values))
        return tokens

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The last block's output, before the final norm."""
        x: Tensor = self.patches(pixel_values)
        if self.form.has_class_token:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self._positions(pixel_values)
        if self.form.norm_first:
            x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x

    def resize(self, image_size: int) -> None:
        """Takes square images of another size from now on: resamples the position embedding, once."""
        grid = image_size // self.form.patch_size
        with torch.no_grad():
            resampled = self._resampled(grid, grid)
        origins = tuple((key, f"{how}, resampled") for key, how in origins_of(self.position_embedding))
        self.position_embedding, self.grid = nn.Parameter(resampled, requires_grad=False), grid
        set_origins(self.position_embedding, origins)

    def _positions(self, pixel_values: Tensor) -> Tensor:
        if not self.dynamic_image_size:
            return self.position_embedding
        patch = self.form.patch_size
        return self._resampled(pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)

    def _resampled(self, rows: int, columns: int) -> Tensor:
        form = self.form
        return resample_position_embedding(
            self.position_embedding,
            self.grid,
            rows,
            columns,
            prefix_tokens=int(form.has_class_token),
            antialias=form.antialias,
        )
