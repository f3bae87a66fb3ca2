"""Answers to questions about images: written, or chosen among candidates.

Source: `BLIP_VQA` of salesforce/BLIP (models/blip_vqa.py, 3a29b74), its `rank_answer`, and the loss of its decoder
(models/med.py): the k candidates whose first token is most probable are scored by the sum of their tokens' smoothed
cross-entropies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import Array, batches
from vlm_export.runtime.generation.cross_attention_decoder import CrossAttentionState
from vlm_export.runtime.generation.logits import log_probabilities
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import IdArray
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.sources import Images
from vlm_export.runtime.inputs.text_cleaning import clean_question
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.attending import (
    HIDDEN,
    attended,
    beam_options,
    decoder_state,
    image_rows,
    paired,
    token_rows,
)
from vlm_export.specs.tasks import AnswerSpec

RANK_K = 128
"""So many candidates are scored, those whose first token is most probable: `k_test` of the original."""


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


class AnswerTask:
    """Answers questions about images; one image serves many questions, one question many images."""

    def __init__(self, session: Session, spec: AnswerSpec) -> None:
        self.session, self.spec = session, spec

    def answer(
        self,
        images: Images,
        questions: str | Sequence[str],
        *,
        candidates: Sequence[str] | None = None,
        rank_k: int = RANK_K,
        beams: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        attend_padding: bool | None = None,
        clean: bool | None = None,
        truncate: bool = False,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[str]:
        """An answer to each question about its image. What is None comes from the manifest.

        The original lets the decoder attend to the padding of the shorter questions of a batch, so its answers to
        questions of different lengths depend on what else is in the batch, and so do these by default.
        `attend_padding=False` hides the padding: every question is answered as if it were alone.

        Args:
            candidates, rank_k: choose among these instead of writing; see `rank_answers`.
            beams, max_length, min_length, attend_padding: of what is written.
            clean: prepare questions as the original's datasets do; None where they start with [ENC].
            truncate: cut questions that are too long instead of raising.

        Raises:
            InputError: an image is unreadable, or a question is too long.
            UsageError: an option is out of its range or none of a ranking, or the numbers do not pair up.
        """
        if candidates is not None:
            if any(option is not None for option in (beams, max_length, min_length, attend_padding)):
                raise UsageError("candidates are ranked, not written", fix="leave out beams, lengths and padding")
            best = self.rank_answers(
                images,
                questions,
                candidates,
                rank_k=rank_k,
                clean=clean,
                truncate=truncate,
                batch_size=batch_size,
                progress=progress,
            )
            return [ranked[0].text for ranked in best]
        options = beam_options(self.session, self.spec, beams=beams, max_length=max_length, min_length=min_length)
        ones = self.spec.attend_padding if attend_padding is None else attend_padding
        batches = self.question_states(
            images, questions, clean=clean, truncate=truncate, batch_size=batch_size, progress=progress
        )
        answers: list[str] = []
        for states, mask in batches:
            state = decoder_state(self.session, self.spec, states, np.ones_like(mask) if ones else mask)
            start = np.full((len(mask), 1), self.spec.tokens.decoder_start, np.int64)
            answers += [self.session.tokenizer.decode(row) for row in generate(state, start, options)]
        return answers

    def rank_answers(
        self,
        images: Images,
        questions: str | Sequence[str],
        candidates: Sequence[str],
        *,
        rank_k: int = RANK_K,
        clean: bool | None = None,
        truncate: bool = False,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[list[RankedAnswer]]:
        """For each question the candidates in the order of the original's score, best first.

        Padding is hidden from the decoder here, in the original too: the order does not depend on the batch.

        Args:
            rank_k: so many candidates are scored, those whose first token is most probable; the others are left out.
            clean, truncate: as in `answer`. Candidates are taken as they are.

        Raises:
            As `answer`.
        """
        tokens = self.spec.tokens
        if isinstance(candidates, str) or not candidates:
            raise UsageError("a ranking needs a list of candidates", got=repr(candidates))
        if rank_k < 1:
            raise UsageError("rank_k must be at least 1", got=str(rank_k))
        rows = tuple((tokens.decoder_start, *row[1:]) for row in self.session.tokenizer.encode_rows(candidates))
        ranked: list[list[RankedAnswer]] = []
        for states, mask in self.question_states(
            images, questions, clean=clean, truncate=truncate, batch_size=batch_size, progress=progress
        ):
            ranked += rank_candidates(
                decoder_state(self.session, self.spec, states, mask),
                Candidates(tuple(candidates), rows),
                k=rank_k,
                pad_token_id=tokens.pad,
                label_smoothing=self.spec.label_smoothing,
            )
        return ranked

    def question_states(
        self,
        images: Images,
        questions: str | Sequence[str],
        *,
        batch_size: int,
        clean: bool | None = None,
        truncate: bool = False,
        progress: bool = False,
    ) -> Iterator[tuple[Array, IdArray]]:
        """Batches of questions that have seen their images: states float32 (B, T, H) and mask int64 (B, T)."""
        sources, sentences, count = paired(images, questions)
        convention = self.spec.question_first_token
        if convention == "enc" if clean is None else clean:
            sentences = [clean_question(text) for text in sentences]
        first = self.spec.tokens.first(convention)
        rows = token_rows(self.session, sentences, first, self.spec.max_question_tokens, truncate=truncate)
        rows = rows * count if len(rows) == 1 else rows
        vision = self.spec.vision
        for batch, seen in image_rows(self.session, vision, sources, count, batch_size, progress=progress):
            ids, mask = self.session.tokenizer.pad_masked([rows[i] for i in batch])
            yield attended(self.session, self.spec.encoder, ids, mask, seen[HIDDEN])[HIDDEN], mask
