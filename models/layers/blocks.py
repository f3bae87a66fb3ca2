"""Blocks that the families share, static by construction: no branch on data, no in-place write, no folded batch.

Axis letters: B batch, T tokens, C channels, H heads or height, W width, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What BERT adds to the scores of hidden tokens: exp(-10000) is 0 in float32, and float16 can hold it, unlike -inf sums.
HIDDEN = -10000.0
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


_FILLING = frozenset({"add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"})


@contextmanager
def meta_modules() -> Iterator[None]:
    """Modules that are built inside have shapes without weights, and nothing initialises them.

    torch fills embeddings on the meta device by Python code that imports its compiler, for longer than `inspect` takes;
    and timm fills weights by steps of its own, each of which goes through that code.
    """
    with _NoInitialisation(), torch.device("meta"):
        yield


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        # What has no values keeps its shape under these.
        if getattr(func, "__name__", None) in _FILLING and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with (openai/CLIP model.py, d05afc4)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def build_activation(name: Activation) -> nn.Module:
    """The activation of that name; `gelu` is the exact form with the error function, `gelu_tanh` its approximation."""
    return QuickGELU() if name == "quick_gelu" else nn.GELU("tanh" if name == "gelu_tanh" else "none")


class MultiHeadAttention(nn.Module):
    """Self-attention over (B, T, width) with one packed query-key-value projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: float32 (B, T, width); mask: float32, broadcast to (B, H, T, T), added to the scores."""
        q, k, v = self._split(x)
        return self._mix(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def step(self, x: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T new tokens after P cached ones: the output, and the keys and values of all.

        Args:
            x: float32 (B, T, width).
            mask: float32, broadcast to (B, H, T, P + T).
            past_key, past_value: float32 (B, H, P, width / H); P may be 0.
        """
        q, k, v = self._split(x)
        key, value = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
        return self._mix(F.scaled_dot_product_attention(q, key, value, attn_mask=mask)), key, value

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Only the batch is -1: a static T then stays a constant in the graph.
        packed = self.qkv(x).reshape(-1, x.shape[1], 3, self.heads, self.head_width)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _mix(self, attended: Tensor) -> Tensor:
        mixed: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return mixed


class KeyValueProjection(nn.Module):
    """Keys and values of states (B, S, states_width) that cross-attention reads: computed once, used at every step."""

    def __init__(self, width: int, states_width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.k = nn.Linear(states_width, width)
        self.v = nn.Linear(states_width, width)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, H, S, width / H), twice."""
        return self._split(self.k(states)), self._split(self.v(states))

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.head_width).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of (B, T, width) to keys and values of `KeyValueProjection`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: float32 (B, T, width); mask: float32, broadcast to (B, H, T, S), added to the scores."""
        q = self.q(x).reshape(-1, x.shape[1], self.heads, self.head_width).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        mixed: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = build_activation(activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = MultiHeadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ScaledBlock(TransformerBlock):
    """As TransformerBlock, with a learned factor for each channel of both branches (LayerScale)."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation, eps: float = 1e-5) -> None:
        super().__init__(width, heads, hidden, activation, eps)
        self.scale1 = nn.Parameter(torch.empty(width))
        self.scale2 = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.scale1 * self.attn(self.norm1(x), mask)
        y: Tensor = x + self.scale2 * self.mlp(self.norm2(x))
        return y


class PostNormBlock(TransformerBlock):
    """Residual block of EVA-02 enormous (timm `EvaBlockPostNorm`): x + norm(attention(x)), then x + norm(mlp(x))."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.norm1(self.attn(x, mask))
        y: Tensor = x + self.norm2(self.mlp(x))
        return y


class PatchEmbedding(nn.Module):
    """Non-overlapping patches: (B, 3, H, W) → (B, H·W / patch², width), row by row."""

    def __init__(self, width: int, patch: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches: Tensor = self.conv(pixel_values)
        return patches.flatten(2).transpose(1, 2)


class AttentionPooling(nn.Module):
    """Pools (B, C, H, W) to (B, D): the mean token attends to itself and all positions.

    Port of AttentionPool2d (openai/CLIP model.py, d05afc4); only the mean token's query is computed, since the
    original discards the other rows.
    """

    def __init__(self, positions: int, channels: int, heads: int, output: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, channels // heads
        self.position_embedding = nn.Parameter(torch.empty(positions + 1, channels))
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, output)

    def forward(self, features: Tensor) -> Tensor:
        spatial = features.flatten(2).transpose(1, 2)
        tokens = torch.cat([spatial.mean(dim=1, keepdim=True), spatial], dim=1) + self.position_embedding
        q = self._split(self.q(tokens[:, :1]))
        attended = F.scaled_dot_product_attention(q, self._split(self.k(tokens)), self._split(self.v(tokens)))
        pooled: Tensor = self.out(attended.transpose(1, 2).flatten(1))
        return pooled

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.head_width).transpose(1, 2)


def build_causal_mask(tokens: int) -> Tensor:
    """float32 (T, T): 0 on and below the diagonal, -inf above it."""
    # On the CPU also when the module around it is built on the meta device: no checkpoint supplies it.
    return torch.full((tokens, tokens), float("-inf"), device="cpu").triu(1)


def padding_mask(attention_mask: Tensor) -> Tensor:
    """int64 (B, S), 1 for tokens and 0 for padding → float32 (B, 1, 1, S): 0 and `HIDDEN`, to add to scores."""
    return (1 - attention_mask).to(torch.float32)[:, None, None, :] * HIDDEN


def cached_causal_mask(attention_mask: Tensor, past_tokens: int, tokens: int) -> Tensor:
    """float32 (B, 1, T, P + T): 0 where one of T new tokens may see a token, `HIDDEN` for padding and later tokens.

    Args:
        attention_mask: int64 (B, P + T), 1 for tokens and 0 for padding.
        past_tokens: P; tokens: T. Symbolic in an export.
    """
    keys, queries = torch.arange(past_tokens + tokens), torch.arange(tokens) + past_tokens
    later = (keys[None, :] > queries[:, None]).to(torch.float32)
    # Gathered rather than added as it is: an exporter cannot know that its length is P + T.
    padding = (1 - attention_mask.index_select(1, keys)).to(torch.float32)
    return torch.clamp(later[None, None] + padding[:, None, None, :], max=1.0) * HIDDEN
