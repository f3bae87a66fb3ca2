"""A decoder with cross-attention as a DecoderState: one graph for the prompt and every token, and its caches.

Two kinds of keys and values go into the graph: those of the tokens so far, which grow with every step, and those of
what a row attends to (an image, a question), which are computed once and never change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import Array, Engine
from vlm_export.runtime.generation.cache import PAST, PRESENT, no_tokens, present_name, taken_rows
from vlm_export.runtime.generation.options import IdArray
from vlm_export.runtime.inputs.images import FloatArray

_OWN, _SOURCE = ".decoder.", ".encoder."


class CrossAttentionState:
    """N rows of a decoder, each of them attending to one of B sources.

    Arrays are never written to, so states may share them.

    Args:
        decoder: the graph of a part `text_decoder`.
        keys_values: what the part `cross_key_values` returns for the sources, float (B, H, S, d) each.
        source_mask: int64 (B, S), 1 for the states that may be attended to. Row i starts with source i.

    Raises:
        InputError: the graph has no cache of the expected names, or the keys and values are not those it takes.
    """

    def __init__(self, decoder: Engine, keys_values: Mapping[str, Array], source_mask: IdArray) -> None:
        self._decoder = decoder
        self._infos = {info.name: info for info in decoder.inputs}
        given = {PAST + name.removeprefix(PRESENT): array for name, array in keys_values.items()}
        wanted = {name for name in self._infos if name.startswith(PAST) and _SOURCE in name}
        tokens = [info for name, info in self._infos.items() if name.startswith(PAST) and _OWN in name]
        if not tokens or wanted != set(given):
            raise InputError(
                "the decoder's graph takes other keys and values",
                expected=", ".join(sorted(given)) or "keys and values of what is attended to",
                got=", ".join(sorted(wanted)) or "none",
                fix="export the bundle again",
            )
        rows = len(source_mask)
        self._sources: IdArray = np.arange(rows, dtype=np.int64)
        self._attended = {name: self._fitted(name, given[name]) for name in sorted(given)}
        self._source_mask = source_mask
        self._past = {info.name: no_tokens(info, rows) for info in tokens}
        self._tokens = 0

    @property
    def rows(self) -> int:
        """N."""
        return len(self._sources)

    def forward(self, token_ids: IdArray) -> FloatArray:
        """Feeds int64 (N, T), T new tokens for each row; returns the logits after each, float32 (N, T, V).

        Padding after a row's tokens needs no mask: no earlier token sees it. Such a row cannot go on.
        """
        self._tokens += token_ids.shape[1]
        outputs = self._decoder.run(
            {
                "input_ids": token_ids,
                "attention_mask": np.ones((len(token_ids), self._tokens), np.int64),
                "encoder_attention_mask": self._source_mask,
                **self._past,
                **self._attended,
            }
        )
        self._past = {name: self._fitted(name, outputs[present_name(name)]) for name in self._past}
        logits: FloatArray = outputs["logits"].astype(np.float32, copy=False)
        return logits

    def step(self, token_ids: IdArray) -> FloatArray:
        """As in DecoderState."""
        return self.forward(token_ids)[:, -1]

    def select(self, rows: IdArray) -> None:
        """As in DecoderState.

        Keys and values of sources are large, 43 MB for an image of 384 pixels in BLIP base. They are moved only
        when a row's source changes, which beams of one image never do.
        """
        sources = self._sources[rows]
        if not np.array_equal(sources, self._sources):
            # One at a time: the old one goes before the next is copied.
            for name in self._attended:
                self._attended[name] = taken_rows(self._attended[name], rows)
            self._source_mask = taken_rows(self._source_mask, rows)
            self._sources = sources
        self._past = {name: taken_rows(array, rows) for name, array in self._past.items()}

    def selected(self, rows: IdArray) -> CrossAttentionState:
        """Another state with those rows; this one stays as it is."""
        twin = object.__new__(CrossAttentionState)
        twin.__dict__.update(self.__dict__)
        twin._attended = dict(self._attended)
        twin.select(rows)
        return twin

    def _fitted(self, name: str, array: Array) -> Array:
        """In the input's own precision, for graphs whose cache is float16."""
        return array.astype(self._infos[name].dtype, copy=False)
