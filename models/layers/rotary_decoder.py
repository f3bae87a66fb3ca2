"""A Llama-like language model with a key-value cache: RMS norms, rotary positions, grouped queries, SwiGLU.

Port of nanoVLM's decoder (huggingface/nanoVLM models/language_model.py: v0.1 6ba9082, v0.2 731d8c6, 4e0c096), valid for
SmolLM2's weights as its checkpoints hold them, up to the position where the original begins to rescale frequencies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.models.layers.blocks import HIDDEN
from vlm_export.specs.codec import Spec


@dataclass(frozen=True)
class RotaryDecoderSizes(Spec):
    """Sizes of the language model.

    Attributes:
        heads, kv_heads: of queries, and of keys and values; `heads` is a multiple of `kv_heads`.
        hidden: of the MLP.
        positions: the longest sequence, cached tokens included.
        eps: of every RMS norm.
        rope_base: what the stored frequencies were made with; the stored ones count.
        rope_scaling: factor of cosines and sines.
        tied: the token embedding is the output matrix.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab_size: int
    positions: int
    eps: float = 1e-5
    rope_base: float = 100000.0
    rope_scaling: float = 1.0
    tied: bool = True

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight, in operators of every opset that runtimes know how to fuse."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class RotaryPositions(nn.Module):
    """position_ids int64 (B, T) → cosines and signed sines, float32 (B, T, 1, head width), for `rotated`."""

    inv_freq: Tensor

    def __init__(self, sizes: RotaryDecoderSizes) -> None:
        super().__init__()
        self.scaling = sizes.rope_scaling
        self.register_buffer("inv_freq", torch.empty(sizes.head_width // 2))

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryPositions:
        """Frequencies have at least float32, whatever weights are rounded to: shorter ones are other positions."""

        def moved(tensor: Tensor) -> Tensor:
            made: Tensor = fn(tensor)
            return made if made.itemsize >= torch.float32.itemsize else tensor.to(made.device, torch.float32)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]  # torch states no types here
        return self

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.to(torch.float32)[:, :, None] * self.inv_freq
        cos, sin = torch.cos(angles) * self.scaling, torch.sin(angles) * self.scaling
        # The sign of the swapped half stands in the table: one negation for all layers.
        return torch.cat([cos, cos], dim=-1)[:, :, None], torch.cat([-sin, sin], dim=-1)[:, :, None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x float32 (B, T, H, d): each head's two halves turned by the angles of `RotaryPositions`."""
    first, second = cut(x, -1, x.shape[-1] // 2)
    return x * cos + torch.cat([second, first], dim=-1) * sin


def cut(x: Tensor, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """The first `size` entries of an axis, and the rest: slices, since an exporter makes a sequence of a split."""
    return x.narrow(dim, 0, size), x.narrow(dim, size, x.shape[dim] - size)


class GroupedQueryAttention(nn.Module):
    """T new tokens after P cached ones; keys and values are never repeated: a group's queries lie side by side."""

    def __init__(self, sizes: RotaryDecoderSizes) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = sizes.heads, sizes.kv_heads, sizes.head_width
        self.qkv = nn.Linear(sizes.width, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the rotated keys and the values of all P + T tokens.

        Args:
            x: float32 (B, T, width).
            mask: float32 (B, 1, G · T, P + T), of `grouped_mask`.
            past_key, past_value: float32 (B, kv_heads, P, d).
        """
        # Of the positions, whose length all layers share: that of x would be asked anew in each of them.
        tokens, kv_heads, d = cos.shape[1], self.kv_heads, self.head_width
        packed = self.qkv(x).reshape(-1, tokens, self.heads + 2 * kv_heads, d)
        turning, v = cut(packed, 2, self.heads + kv_heads)
        q, k = cut(rotated(turning, cos, sin), 2, self.heads)
        key = torch.cat([past_key, k.transpose(1, 2)], dim=2)
        value = torch.cat([past_value, v.transpose(1, 2)], dim=2)
        queries = q.transpose(1, 2).reshape(-1, kv_heads, self.heads // kv_heads * tokens, d)
        scores = (queries @ key.transpose(2, 3)) * d**-0.5 + mask
        attended = (scores.softmax(dim=-1) @ value).reshape(-1, self.heads, tokens, d)
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(-1, tokens, self.heads * d))
        return mixed, key, value


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); packing gate and up would only have a host copy them apart again."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class RotaryBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, sizes: RotaryDecoderSizes) -> None:
        super().__init__()
        self.norm1 = RMSNorm(sizes.width, eps=sizes.eps)
        self.attn = GroupedQueryAttention(sizes)
        self.norm2 = RMSNorm(sizes.width, eps=sizes.eps)
        self.mlp = GatedMLP(sizes.width, sizes.hidden)

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first half, where tokens see one another; arguments and the rest as in `GroupedQueryAttention`."""
        attended, key, value = self.attn(self.norm1(x), cos, sin, mask, past_key, past_value)
        return x + attended, key, value

    def transform(self, x: Tensor) -> Tensor:
        """The second half, each token by itself."""
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class LanguageModel(nn.Module):
    """All weights of the language model; Parts take of them what they need."""

    def __init__(self, sizes: RotaryDecoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.width)
        self.rotary = RotaryPositions(sizes)
        self.blocks = nn.ModuleList(RotaryBlock(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width, eps=sizes.eps)
        if not sizes.tied:
            self.head = nn.Linear(sizes.width, sizes.vocab_size, bias=False)


class EmbedTokens(nn.Module):
    """input_ids int64 (B, T) → float32 (B, T, width)."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.embedding = model.embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(input_ids)
        return embedded


class CachedDecoder(nn.Module):
    """T new tokens after P cached ones → logits and the grown cache.

    forward(inputs_embeds float32 (B, T, width), attention_mask int64 (B, P + T), position_ids int64 (B, T),
    num_logits_to_keep int64 (), then for each layer past key and value float32 (B, kv_heads, P, d)) → logits float32
    (B, K, vocabulary) of the last K tokens, then for each layer key and value float32 (B, kv_heads, P + T, d).

    K is num_logits_to_keep, or T where that is 0 or more than T. A host that generates asks for 1: a prompt's other
    logits would take longer than a layer, and at 8,192 tokens 1.6 GB.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.groups = model.sizes.heads // model.sizes.kv_heads
        self.rotary, self.blocks, self.norm = model.rotary, model.blocks, model.norm
        # Of either only the matrix (vocabulary, width) is used.
        self.head: nn.Module = model.embedding if model.sizes.tied else model.head

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        past_tokens, tokens, width = cache[0].shape[2], inputs_embeds.shape[1], inputs_embeds.shape[2]
        # Both are computed in float32, whatever the weights have.
        mask = grouped_mask(attention_mask, past_tokens, tokens, self.groups).to(inputs_embeds.dtype)
        cos, sin = (table.to(inputs_embeds.dtype) for table in self.rotary(position_ids))
        x, present = inputs_embeds, list[Tensor]()
        for i, block in enumerate(cast("Iterable[RotaryBlock]", self.blocks)):
            x, key, value = block.attend(x, cos, sin, mask, cache[2 * i], cache[2 * i + 1])
            present += [key, value]
            if i + 1 == len(self.blocks):
                # From here on no token sees another. A slice of the last 0 holds all of them.
                x = x[:, -num_logits_to_keep:]
            x = block.transform(x)
        table = cast("Tensor", self.head.weight)
        # In two dimensions it exports as Gemm, which reads the table as it is stored.
        logits = F.linear(self.norm(x).reshape(-1, width), table)
        return logits.reshape(inputs_embeds.shape[0], -1, table.shape[0]), *present


def grouped_mask(attention_mask: Tensor, past_tokens: int, tokens: int, groups: int) -> Tensor:
    """float32 (B, 1, groups · T, P + T): 0 where one of T new tokens may see a token, `HIDDEN` elsewhere.

    A token sees itself even where it is padding. Otherwise a row of padding would see nothing, and its weights would
    be what rounding leaves of scores beside `HIDDEN`, different in every engine. Real tokens never see padding.

    Args:
        attention_mask: int64 (B, P + T), 1 for tokens and 0 for padding, which may stand on either side.
        past_tokens: P; tokens: T. Symbolic in an export.
        groups: query heads that share one head of keys.
    """
    keys, queries = torch.arange(past_tokens + tokens), torch.arange(tokens) + past_tokens
    later = (keys[None, :] > queries[:, None]).to(torch.float32)
    others = (keys[None, :] != queries[:, None]).to(torch.float32)
    # Gathered rather than taken as it is: an exporter cannot know that its length is P + T.
    padding = (1 - attention_mask.index_select(1, keys)).to(torch.float32)
    hidden = torch.clamp(later[None, None] + padding[:, None, None, :] * others[None, None], max=1.0) * HIDDEN
    return hidden.repeat(1, 1, groups, 1)


def cache_names(layers: int, prefix: str) -> tuple[str, ...]:
    """`<prefix>.<layer>.key` and `.value` for each layer, in the order of `CachedDecoder`."""
    return tuple(f"{prefix}.{i}.{what}" for i in range(layers) for what in ("key", "value"))
