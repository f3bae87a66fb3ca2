"""Answers to questions about images: written, or chosen among candidates.

Source: `BLIP_VQA` of salesforce/BLIP (models/blip_vqa.py, 3a29b74).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlm_export.errors import UsageError
from vlm_export.runtime.engines.onnxruntime import Array
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import IdArray
from vlm_export.runtime.inputs.sources import Images
from vlm_export.runtime.inputs.text_cleaning import clean_question
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.answer_ranking import Candidates, RankedAnswer, rank_candidates
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
        batches = self._question_states(images, questions, clean, truncate, batch_size, progress)
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
        for states, mask in self._question_states(images, questions, clean, truncate, batch_size, progress):
            ranked += rank_candidates(
                decoder_state(self.session, self.spec, states, mask),
                Candidates(tuple(candidates), rows),
                k=rank_k,
                pad_token_id=tokens.pad,
                label_smoothing=self.spec.label_smoothing,
            )
        return ranked

    def _question_states(
        self,
        images: Images,
        questions: str | Sequence[str],
        clean: bool | None,
        truncate: bool,
        batch_size: int,
        progress: bool,
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
