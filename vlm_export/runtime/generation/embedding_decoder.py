"""A decoder that reads embeddings as a DecoderState: images' features and words in one row, and one cache.

The prompt comes as embeddings, later tokens as ids, which a second graph embeds. Rows of several lengths are padded on
the left; positions count a row's own tokens, so a row decodes the same with and without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import Array, Engine
from vlm_export.runtime.generation.cache import PAST, no_tokens, present_name, taken_rows
from vlm_export.runtime.generation.options import IdArray
from vlm_export.runtime.inputs.images import FloatArray

IDS, EMBEDS, MASK, POSITIONS, LOGITS = "input_ids", "inputs_embeds", "attention_mask", "position_ids", "logits"
KEPT_LOGITS = "num_logits_to_keep"
_ALL, _LAST = np.array(0, np.int64), np.array(1, np.int64)
_PIECE_TOKENS = 256
"""Of a prompt, fed one after the other: a piece's scores stay in the processor's cache, and no token is compared with
later ones. Shorter pieces read the weights too often."""


class EmbeddedRows(NamedTuple):
    """Prompts of a batch: float32 (B, T, D), and int64 (B, T), 0 for the padding on the left."""

    inputs_embeds: FloatArray
    attention_mask: IdArray


class EmbeddedDecoderState:
    """N rows of a decoder-only model, each of them at its own position.

    Arrays are never written to.

    Args:
        decoder: the graph of a part `decoder`.
        embed_tokens: the graph of a part `embed_tokens`.
        prompts: what the first step feeds, whatever its ids.
        cached: False feeds all tokens again at each step, which proves the cache: slow, for tests.

    Raises:
        InputError: the decoder's graph lacks caches of the expected names, or `num_logits_to_keep`.
        UsageError: a prompt has no tokens.
    """

    def __init__(self, decoder: Engine, embed_tokens: Engine, prompts: EmbeddedRows, *, cached: bool = True) -> None:
        infos = {info.name: info for info in decoder.inputs}
        past = [info for info in decoder.inputs if info.name.startswith(PAST)]
        outputs = {info.name for info in decoder.outputs}
        if not past or KEPT_LOGITS not in infos or not {present_name(p.name) for p in past} | {LOGITS} <= outputs:
            raise InputError(
                "the decoder's graph has no cache, or no choice of logits",
                expected=f"inputs {PAST}N.key and .value, the outputs that follow them, and {KEPT_LOGITS}",
                got=", ".join(sorted(infos)),
                fix="export the bundle again",
            )
        if not len(prompts.attention_mask) or not prompts.attention_mask[:, -1].all():
            raise UsageError("a prompt needs a token in its last place, and a batch needs a prompt")
        self._decoder = decoder
        self._embed_tokens = embed_tokens
        self._embeds_dtype = infos[EMBEDS].dtype
        self._caches = [(info.name, present_name(info.name), np.dtype(info.dtype)) for info in past]
        self._cached = cached
        self._waiting: FloatArray | None = prompts.inputs_embeds
        self._fed: Array | None = None
        self._mask = prompts.attention_mask
        self._lengths: IdArray = prompts.attention_mask.sum(axis=1)
        self._past = {info.name: no_tokens(info, len(self._mask)) for info in past}

    @property
    def rows(self) -> int:
        """N."""
        return len(self._mask)

    def forward(self, token_ids: IdArray) -> Array:
        """Feeds int64 (N, T); the first call feeds the prompts. Returns logits (N, T, V) as the graph does."""
        pieces = list(self._decoded(token_ids, _ALL))
        return np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]

    def _decoded(self, token_ids: IdArray, kept: Array) -> Iterator[Array]:
        """The graph's logits for each piece of what is fed; `kept`: of how many of a piece's tokens, 0 for all."""
        embeds, positions = self._next(token_ids)
        tokens = embeds.shape[1]
        past_tokens = self._mask.shape[1] - tokens
        for start, stop in pairwise(_piece_ends(tokens) if self._cached else (0, tokens)):
            outputs = self._decoder.run(
                {
                    EMBEDS: embeds[:, start:stop],
                    MASK: self._mask[:, : past_tokens + stop],
                    POSITIONS: positions[:, start:stop],
                    KEPT_LOGITS: kept,
                    **self._past,
                }
            )
            if self._cached:
                self._past = {
                    name: array if (array := outputs[present]).dtype == dtype else array.astype(dtype)
                    for name, present, dtype in self._caches
                }
            yield outputs[LOGITS]

    def _next(self, token_ids: IdArray) -> tuple[Array, IdArray]:
        """Embeddings (N, T, D) and positions (N, T) of what the decoder has to see; the mask grows with them."""
        if self._waiting is not None:
            embeds, self._waiting = self._waiting, None
            positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)
        else:
            embeds = self._embed_tokens.run({IDS: token_ids})[EMBEDS]
            positions = self._lengths[:, None] + np.arange(token_ids.shape[1])
            self._lengths = self._lengths + token_ids.shape[1]
            self._mask = np.concatenate([self._mask, np.ones_like(token_ids)], axis=1)
        embeds = embeds.astype(self._embeds_dtype, copy=False)
        if not self._cached:
            embeds = self._fed = embeds if self._fed is None else np.concatenate([self._fed, embeds], axis=1)
            positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)
        return embeds, positions

    def step(self, token_ids: IdArray) -> FloatArray:
        """As in DecoderState."""
        *_, last = self._decoded(token_ids, _LAST)
        logits: FloatArray = last[:, -1].astype(np.float32, copy=False)
        return logits

    def select(self, rows: IdArray) -> None:
        """As in DecoderState. Where rows stay neighbours in order, nothing is copied."""
        self._mask, self._lengths = taken_rows(self._mask, rows), taken_rows(self._lengths, rows)
        if self._waiting is not None:
            self._waiting = taken_rows(self._waiting, rows)
        if self._fed is not None:
            self._fed = taken_rows(self._fed, rows)
        for name in self._past:
            self._past[name] = taken_rows(self._past[name], rows)


def _piece_ends(tokens: int) -> list[int]:
    """0 and the ends of pieces of about one length, none above `_PIECE_TOKENS`."""
    count = -(-tokens // _PIECE_TOKENS)
    return [tokens * i // count for i in range(count + 1)]


def left_padded(rows: Sequence[FloatArray]) -> EmbeddedRows:
    """Prompts float32 (T, D) of several lengths as one batch, zeros and a masked left before the shorter ones."""
    longest = max(map(len, rows))
    embeds = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        embeds[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return EmbeddedRows(embeds, mask)
