"""The text transformer of dual encoders: tokens, learned positions, blocks, one pooled token, a projection.

One module for what is published: OpenAI's and Hugging Face's CLIP (causal, pooled at the end of the text), and SigLIP
and what open_clip trains besides (all tokens see each other, other pooled tokens, a projection with a bias or none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import Activation, ScaledBlock, TransformerBlock, build_causal_mask
from vlm_export.specs.codec import Spec

TextPool = Literal["highest_id", "end_token", "first", "last"]


@dataclass(frozen=True)
class TextForm(Spec):
    """Sizes and choices of a text transformer.

    Attributes:
        output: width of the embedding.
        pool: which token's state becomes the embedding: that of the highest id, of the first `end_token_id`, the first
            or the last one.
        causal: a token sees those before it alone. Then texts may be padded to any length, unless the last is pooled.
        projection: "linear", "biased" or "none", which makes the state itself the embedding.
        layer_scale: blocks have a learned factor for each channel.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    context_length: int
    vocab_size: int
    output: int
    pool: TextPool = "highest_id"
    end_token_id: int = 0
    causal: bool = True
    projection: Literal["linear", "biased", "none"] = "linear"
    layer_scale: bool = False
    activation: Activation = "gelu"
    eps: float = 1e-5

    @property
    def sees_padding(self) -> bool:
        """Whether what fills a text up to the context changes its embedding."""
        return not self.causal or self.pool == "last"


class TextTransformer(nn.Module):
    """input_ids int64 (B, T) → text_embeds float32 (B, D), not normalised.

    1 ≤ T ≤ context length where the form does not see padding: tokens after the pooled one cannot change the row, and
    a batch needs only its longest row's T. Otherwise T is the context length.
    """

    causal_mask: Tensor

    def __init__(self, form: TextForm) -> None:
        super().__init__()
        width, block = form.width, ScaledBlock if form.layer_scale else TransformerBlock
        self.form = form
        self.token_embedding = nn.Embedding(form.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(form.context_length, width))
        if form.causal:
            self.register_buffer("causal_mask", build_causal_mask(form.context_length), persistent=False)
        self.blocks = nn.ModuleList(
            block(width, form.heads, form.hidden, form.activation, form.eps) for _ in range(form.layers)
        )
        self.norm = nn.LayerNorm(width, eps=form.eps)
        if form.projection != "none":
            self.projection = nn.Parameter(torch.empty(width, form.output))
        if form.projection == "biased":
            self.projection_bias = nn.Parameter(torch.empty(form.output))

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = self.form.context_length if self.form.sees_padding else input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.position_embedding[:tokens]
        mask = self.causal_mask[:tokens, :tokens] if self.form.causal else None
        for block in self.blocks:
            x = block(x, mask)
        # The norm acts on each token alone, so pooling first gives the same row for a T-th of the work.
        embeds: Tensor = self.norm(self._pooled(x, input_ids))
        if self.form.projection != "none":
            embeds = embeds @ self.projection
        return embeds + self.projection_bias if self.form.projection == "biased" else embeds

    def _pooled(self, x: Tensor, input_ids: Tensor) -> Tensor:
        if self.form.pool in ("first", "last"):
            return x[:, 0 if self.form.pool == "first" else -1]
        end = self._end_positions(input_ids).reshape(-1, 1, 1).expand(-1, 1, self.form.width)
        return x.gather(1, end).reshape(-1, self.form.width)

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        if self.form.pool == "highest_id":
            return input_ids.argmax(dim=-1)
        return (input_ids == self.form.end_token_id).to(torch.int32).argmax(dim=-1)
