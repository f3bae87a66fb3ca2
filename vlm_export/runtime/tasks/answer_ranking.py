"""Candidate answers in the order of the original's score.

Source: `rank_answer` of salesforce/BLIP (models/blip_vqa.py, 3a29b74) and the loss of its decoder (models/med.py): the
k candidates whose first token is most probable are scored by the sum of their tokens' smoothed cross-entropies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError
from vlm_export.runtime.engines.runs import batches
from vlm_export.runtime.generation.cross_attention_decoder import CrossAttentionState
from vlm_export.runtime.generation.logits import log_probabilities
from vlm_export.runtime.generation.options import IdArray
from vlm_export.runtime.inputs.images import FloatArray


@dataclass(frozen=True)
class RankedAnswer:
    """A candidate: its number among the candidates, its text, and minus the sum of its tokens' losses."""

    index: int
    text: str
    score: float


@dataclass(frozen=True)
class Candidates:
    """Answers as token ids.

    Attributes:
        texts: as they were given.
        rows: for each its ids with the token that starts decoding and the one that ends it: at least two.
    """

    texts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def rank_candidates(
    state: CrossAttentionState,
    candidates: Candidates,
    *,
    k: int,
    pad_token_id: int,
    label_smoothing: float,
    batch_size: int = 32,
) -> list[list[RankedAnswer]]:
    """For each row of a fresh state the k candidates with the most probable first token, best score first.

    Args:
        state: B questions; left at the token that starts decoding.
        candidates: at least one.
        k: bounded by the number of candidates.
        pad_token_id: tokens of that id do not count.
        label_smoothing: share of the loss that all tokens of the vocabulary have in common.
        batch_size: pairs of a question and a candidate that the decoder scores at a time.
    """
    start = np.full((state.rows, 1), candidates.rows[0][0], np.int64)
    first = _checked(log_probabilities(state.step(start)))
    first_tokens = [row[1] for row in candidates.rows]
    kept = np.argsort(-first[:, first_tokens], axis=1, kind="stable")[:, :k]
    pairs = [(question, int(index)) for question, chosen in enumerate(kept) for index in chosen]
    scores = np.zeros(first[:, first_tokens].shape, np.float64)
    for batch in batches(range(len(pairs)), batch_size):
        questions, indices = np.array([pairs[i] for i in batch], np.int64).T
        ids = _padded([candidates.rows[i] for i in indices], pad_token_id)
        losses = _smoothed_losses(first[questions], ids[:, 1], label_smoothing)
        total = np.where(ids[:, 1] == pad_token_id, 0.0, losses)
        if ids.shape[1] > 2:
            logits = state.selected(questions).forward(ids[:, 1:-1])
            flat = _checked(log_probabilities(logits.reshape(-1, logits.shape[2])))
            losses = _smoothed_losses(flat, ids[:, 2:].reshape(-1), label_smoothing).reshape(len(ids), -1)
            total = total + np.where(ids[:, 2:] == pad_token_id, 0.0, losses).sum(axis=1)
        scores[questions, indices] = -total
    return [_ranked(candidates, chosen, scores[question]) for question, chosen in enumerate(kept)]


def _ranked(candidates: Candidates, chosen: IdArray, scores: npt.NDArray[np.float64]) -> list[RankedAnswer]:
    # Of equal ones the one with the more probable first token comes first, as in the original's argmax.
    order = chosen[np.argsort(-scores[chosen], kind="stable")]
    return [RankedAnswer(int(i), candidates.texts[i], float(scores[i])) for i in order]


def _smoothed_losses(log: FloatArray, targets: IdArray, smoothing: float) -> npt.NDArray[np.float64]:
    """Cross-entropy with label smoothing as torch defines it: log float32 (N, V), targets int64 (N,) → (N,)."""
    own = np.take_along_axis(log, targets[:, None], axis=1)[:, 0].astype(np.float64)
    losses: npt.NDArray[np.float64] = -(1 - smoothing) * own - smoothing * log.mean(axis=1, dtype=np.float64)
    return losses


def _padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> IdArray:
    ids = np.full((len(rows), max(map(len, rows))), pad_token_id, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def _checked(log: FloatArray) -> FloatArray:
    if not np.isfinite(log).all():
        raise InputError(
            "a decoder returned logits that are not finite",
            expected="finite logits",
            fix="use the fp32 variant, or verify the bundle on this machine",
        )
    return log
