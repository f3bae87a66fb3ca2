"""From a prompt to token ids: the loop that every decoder shares, whatever its cache looks like.

Greedy search, sampling and beam search choose what `generate` of transformers 4.25.1 chooses, which BLIP was published
with (`generation/utils.py`, `generation/beam_search.py`), and leave aside what that computes in vain: a row that
has ended is dropped from the decoder. The loop knows token ids alone; masks, positions, left padding and images are
the DecoderState's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlm_export.errors import UsageError
from vlm_export.runtime.generation.beam_search import search_beams
from vlm_export.runtime.generation.logits import adjusted_scores, draw_tokens, narrowed_scores, next_logits
from vlm_export.runtime.generation.options import (
    DecoderState,
    GenerationOptions,
    IdArray,
    checked_prompt,
)


class NewToken(NamedTuple):
    """A token that a row has gained; `is_last` when the row ends with it, by an end token or by its length."""

    row: int
    token_id: int
    is_last: bool


def generate(
    state: DecoderState, prompt: IdArray, options: GenerationOptions, *, first_row: int = 0
) -> list[list[int]]:
    """Each row's token ids: its prompt, then what was generated, the end token included where there is one.

    Args:
        state: a fresh decoder of B rows; spent afterwards.
        prompt: int64 (B, T), left-padded by the caller if its rows differ in length.
        options: what is asked for.
        first_row: the number of the batch's first row among all rows of the caller. Sampling draws from one generator
            per row, made from the seed and the row's number: a row draws the same in every batch, and row 0 draws
            what it would draw alone.

    Raises:
        UsageError: the prompt is no matrix of ids or leaves no room, or the options do not fit the vocabulary.
        InputError: the decoder returned another shape than logits per row, or values that are not finite.
    """
    ids = checked_prompt(prompt)
    end_length = options.end_length(ids.shape[1])
    if options.beams > 1:
        return search_beams(state, ids, options, end_length)
    rows: list[list[int]] = ids.tolist()
    for token in _decode(state, ids, options, end_length, first_row):
        rows[token.row].append(token.token_id)
    return rows


def stream(
    state: DecoderState, prompt: IdArray, options: GenerationOptions, *, first_row: int = 0
) -> Iterator[NewToken]:
    """The tokens that `generate` appends to its prompts, as they come: step by step, rows in order within a step.

    Arguments and errors are those of `generate`; calling it checks them, iterating runs the decoder.

    Raises:
        UsageError: beams are asked for too: a beam search knows its first token only at its end.
    """
    if options.beams > 1:
        raise UsageError(
            "a beam search cannot be streamed",
            where="beams",
            expected="1",
            got=str(options.beams),
            fix="stream greedy search or sampling",
        )
    ids = checked_prompt(prompt)
    return _decode(state, ids, options, options.end_length(ids.shape[1]), first_row)


def _decode(
    state: DecoderState, ids: IdArray, options: GenerationOptions, end_length: int, first_row: int
) -> Iterator[NewToken]:
    rows = np.arange(len(ids))
    generators = _generators(options, first_row, len(ids))
    fed = ids
    while len(rows):
        scores = adjusted_scores(next_logits(state, fed, options), ids, options)
        if options.sample:
            tokens = draw_tokens(narrowed_scores(scores, options), [generators[row] for row in rows])
        else:
            tokens = scores.argmax(axis=1).astype(np.int64)
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
        ended = np.isin(tokens, options.eos_token_ids) | (ids.shape[1] >= end_length)
        for row, token, is_last in zip(rows, tokens, ended, strict=True):
            yield NewToken(int(row), int(token), bool(is_last))
        alive = np.flatnonzero(~ended)
        if 0 < len(alive) < len(rows):
            state.select(alive)
        rows, ids, fed = rows[alive], ids[alive], tokens[alive, None]


def _generators(options: GenerationOptions, first_row: int, count: int) -> list[np.random.Generator]:
    """One per row, from the seed and the row's number alone; none without sampling."""
    if not options.sample:
        return []
    entropy = np.random.SeedSequence(options.seed).entropy
    numbers = range(first_row, first_row + count)
    return [np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(number,))) for number in numbers]
