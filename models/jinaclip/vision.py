"""EVA-02 as Jina CLIP has it: learned and rotary positions, SwiGLU, and a norm inside of both branches.

Port of jinaai/jina-clip-implementation eva_model.py and rope_embeddings.py, for `rope_embeddings`, `naive_swiglu` and
`subln`, which are what was published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.models.jinaclip.architecture import EvaSizes
from vlm_export.models.layers.blocks import MultiHeadAttention, PatchEmbedding

# What the original's code fixes.
_EPS, _ROTARY_BASE = 1e-6, 10000.0


def rotary_tables(sizes: EvaSizes) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of all tokens, float32 (1 + P, head width); the class token is not turned.

    Half of a head's channels turns with the patch's row, the other half with its column, two neighbouring channels by
    one angle. A grid is stretched over the reference grid.
    """
    grid, half = sizes.grid, sizes.width // sizes.heads // 2
    # On the CPU also where the module around them is built on the meta device: no checkpoint supplies them.
    exponents = torch.arange(0, half, 2, device="cpu").to(torch.float32) / half
    places = torch.arange(grid, device="cpu") / grid * sizes.reference_grid
    angles = (places[:, None] * (1.0 / _ROTARY_BASE**exponents)).repeat_interleave(2, dim=1)
    rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
    patches = torch.cat([rows, columns], dim=-1).reshape(grid * grid, 2 * half)
    turns = torch.cat([torch.zeros(1, 2 * half, device="cpu"), patches])
    signs = torch.tensor([-1.0, 1.0], device="cpu").repeat(half)
    return turns.cos(), turns.sin() * signs


class EvaAttention(MultiHeadAttention):
    """Self-attention whose queries and keys are turned, with a norm before the output; keys have no bias."""

    neighbours: Tensor

    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__(sizes.width, sizes.heads)
        self.norm = nn.LayerNorm(sizes.width, eps=_EPS)
        pairs = torch.arange(self.head_width, device="cpu").reshape(-1, 2).flip(1).flatten()
        self.register_buffer("neighbours", pairs, persistent=False)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x float32 (B, H, T, d), each pair of neighbouring channels turned by the angles of `rotary_tables`."""
        return x * cos + x.index_select(3, self.neighbours) * sin

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self._split(x)
        attended = F.scaled_dot_product_attention(self.turned(q, cos, sin), self.turned(k, cos, sin), v)
        mixed: Tensor = self.out(self.norm(attended.transpose(1, 2).flatten(2)))
        return mixed


class SwiGLU(nn.Module):
    """down(norm(silu(gate(x)) · up(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=_EPS)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))
        return y


class EvaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, sizes: EvaSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=_EPS)
        self.attn = EvaAttention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, eps=_EPS)
        self.mlp = SwiGLU(sizes.width, sizes.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn.attend(self.norm1(x), cos, sin)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class EvaVision(nn.Module):
    """pixel_values float32 (B, 3, S, S), normalised → image_embeds float32 (B, D), not normalised: the class token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: EvaSizes, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.patches = PatchEmbedding(sizes.width, sizes.patch_size, bias=True)
        self.class_embedding = nn.Parameter(torch.empty(sizes.width))
        self.position_embedding = nn.Parameter(torch.empty(sizes.grid**2 + 1, sizes.width))
        self.blocks = nn.ModuleList(EvaBlock(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=_EPS)
        for name, table in zip(("cos", "sin"), rotary_tables(sizes), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x: Tensor = self.patches(pixel_values)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.position_embedding
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        # The norm acts on each token alone.
        embeds: Tensor = self.norm(x[:, 0])
        return embeds[:, : self.embed_dim]
