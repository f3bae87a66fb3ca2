"""Beam search over a DecoderState.

Chooses what `beam_search` with `BeamSearchScorer` of transformers 4.25.1 chooses (early stopping off, one sequence
returned), with three differences in what is computed for it:

- The prompt runs once per item, not once per beam; the beams part with the first choice.
- An item whose search is over leaves the decoder, instead of being fed pad tokens until the last item is done.
- Beams exist only with a finite score. Where the vocabulary has fewer tokens than beams there are fewer of them,
  instead of copies that start at -1e9.

Several end tokens are an extension: candidates are then kept for each of them, as later versions do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vlm_export.runtime.generation.logits import adjusted_scores, log_probabilities, next_logits
from vlm_export.runtime.generation.options import DecoderState, GenerationOptions, IdArray
from vlm_export.runtime.inputs.images import FloatArray


@dataclass(frozen=True)
class _Hypothesis:
    score: float
    ids: tuple[int, ...]


@dataclass
class _Item:
    """One prompt's search.

    Attributes:
        ids: int64 (n, T), the live beams, best first; n ≤ beams.
        sums: float64 (n,), the sums of their adjusted log-probabilities.
        finished: the best hypotheses that have ended, in order of arrival; at most as many as beams.
        done: nothing that could still come would be better than the worst of them.
    """

    ids: IdArray
    sums: npt.NDArray[np.float64]
    finished: list[_Hypothesis] = field(default_factory=list)
    done: bool = False


def search_beams(state: DecoderState, prompt: IdArray, options: GenerationOptions, end_length: int) -> list[list[int]]:
    """The best hypothesis for each prompt, with its end token if it has ended.

    Args:
        state: a fresh decoder of B rows.
        prompt: int64 (B, T), T < end_length.
        options: beams, length_penalty, min_length, repetition_penalty and the end tokens are used.
        end_length: length of a row at which the search stops.

    Raises:
        As `generate`.
    """
    items = [_Item(row[None], np.zeros(1)) for row in prompt]
    live, fed = items, prompt
    while live:
        logits = next_logits(state, fed, options)
        ids = np.concatenate([item.ids for item in live])
        scores = adjusted_scores(log_probabilities(logits), ids, options)
        starts = np.cumsum([0, *(len(item.ids) for item in live)])
        parents = [
            start + _advance(item, scores[start:end], options)
            for item, start, end in zip(live, starts, starts[1:], strict=False)
        ]
        if ids.shape[1] + 1 >= end_length:
            break
        going = [(item, rows) for item, rows in zip(live, parents, strict=True) if not item.done]
        live = [item for item, _ in going]
        if live:
            _select(state, np.concatenate([rows for _, rows in going]), len(ids))
            fed = np.concatenate([item.ids[:, -1:] for item in live])
    return [list(_best(item, options).ids) for item in items]


def _select(state: DecoderState, rows: IdArray, present: int) -> None:
    """Reorders the decoder's rows, which copies caches, only where the order changes."""
    if not np.array_equal(rows, np.arange(present)):
        state.select(rows)


def _advance(item: _Item, scores: FloatArray, options: GenerationOptions) -> IdArray:
    """Takes one token into an item: the live beams change, ended ones are kept if good enough.

    Args:
        item: n live beams of length T.
        scores: float32 (n, V), adjusted log-probabilities of the next token.

    Returns:
        Which old beam each new one continues, int64 (m,).
    """
    length = item.ids.shape[1]
    sums, beams, tokens = _candidates(item, scores, options)
    kept: list[int] = []
    for rank, token in enumerate(tokens):
        if len(kept) == options.beams:
            break
        if token not in options.eos_token_ids:
            kept.append(rank)
        elif rank < options.beams:
            ids = (*item.ids[beams[rank]].tolist(), int(token))
            _finish(item, _Hypothesis(sums[rank] / length**options.length_penalty, ids), options)
    # The bound counts the best candidate at the length without its new token, whether it has ended or not.
    enough = len(item.finished) == options.beams
    item.done = not kept or (enough and _worst(item) >= sums[0] / length**options.length_penalty)
    parents = beams[kept]
    item.ids = np.concatenate([item.ids[parents], tokens[kept, None]], axis=1)
    item.sums = sums[kept]
    return parents


def _candidates(
    item: _Item, scores: FloatArray, options: GenerationOptions
) -> tuple[npt.NDArray[np.float64], IdArray, IdArray]:
    """The best continuations of all beams together, best first: sums float64, beams and tokens int64.

    So many that enough remain when those that end are taken out. Equal sums come in order of beam and token.
    """
    count = options.beams * max(2, 1 + len(set(options.eos_token_ids)))
    sums, beams, tokens = [], [], []
    for beam, row in enumerate(scores):
        best = np.flatnonzero(row >= np.partition(row, -count)[-count]) if count < len(row) else np.arange(len(row))
        best = best[np.isfinite(row[best])]
        sums.append(item.sums[beam] + row[best].astype(np.float64))
        beams.append(np.full(len(best), beam, np.int64))
        tokens.append(best.astype(np.int64))
    total = np.concatenate(sums)
    order = np.argsort(-total, kind="stable")[:count]
    return total[order], np.concatenate(beams)[order], np.concatenate(tokens)[order]


def _finish(item: _Item, hypothesis: _Hypothesis, options: GenerationOptions) -> None:
    """Keeps a hypothesis if there is room or it beats the worst one, which then goes; of equal ones the oldest."""
    if len(item.finished) == options.beams:
        if not hypothesis.score > _worst(item):
            return
        item.finished.remove(min(item.finished, key=lambda one: one.score))
    item.finished.append(hypothesis)


def _worst(item: _Item) -> float:
    return min(hypothesis.score for hypothesis in item.finished)


def _best(item: _Item, options: GenerationOptions) -> _Hypothesis:
    """The best of those that ended and, unless the search was over before, of the live ones; of equal ones the last."""
    if not item.done:
        penalty = item.ids.shape[1] ** options.length_penalty
        for ids, total in zip(item.ids, item.sums, strict=True):
            _finish(item, _Hypothesis(total / penalty, tuple(ids.tolist())), options)
    return max(reversed(item.finished), key=lambda one: one.score)
