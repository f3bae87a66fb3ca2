"""Answers to questions about pictures: written, or chosen among candidates.

Source: `BLIP_VQA` of salesforce/BLIP (models/blip_vqa.py, 3a29b74).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlm_export.errors import UsageError
from vlm_export.runtime.answer_ranking import Candidates, RankedAnswer, rank_candidates
from vlm_export.runtime.decoding import Decoding, given_or, shortest_length
from vlm_export.runtime.engine import Array
from vlm_export.runtime.generation import GenerationOptions, generate
from vlm_export.runtime.generation_options import IdArray
from vlm_export.runtime.given import Pictures
from vlm_export.runtime.multimodal import HIDDEN, paired
from vlm_export.runtime.text_cleaning import clean_question
from vlm_export.specs.tasks import AnswerSpec

RANK_K = 128
"""So many candidates are scored, those whose first token is most probable: `k_test` of the original."""

ENCODER = "vqa_encoder"
_CHECKPOINT = "a checkpoint for questions, such as Salesforce's model_base_vqa_capfilt_large.pth"


class Answering(Decoding):
    """Answers questions about pictures; one picture serves many questions, one question many pictures."""

    def answer(
        self,
        images: Pictures,
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
        """An answer to each question about its picture. What is None comes from the manifest.

        The original lets the decoder attend to the padding of the shorter questions of a batch, so its answers to
        questions of different lengths depend on what else is in the batch, and so do these by default.
        `attend_padding=False` hides the padding: every question is answered as if it were alone.

        Args:
            candidates, rank_k: choose among these instead of writing; see `rank_answers`.
            beams, max_length, min_length, attend_padding: of what is written.
            clean: prepare questions as the original's datasets do; None where they start with [ENC].
            truncate: cut questions that are too long instead of raising.

        Raises:
            InputError: the bundle answers no questions, a picture is unreadable, or a question is too long.
            UsageError: an option is out of its range or none of a ranking, or the numbers do not pair up.
        """
        asked = self._answer_settings()
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
        options = self._answer_options(asked, beams, max_length, min_length)
        ones = asked.attend_padding if attend_padding is None else attend_padding
        batches = self._question_states(images, questions, clean, truncate, batch_size, progress)
        answers: list[str] = []
        for states, mask in batches:
            state = self._decoder_state(states, np.ones_like(mask) if ones else mask)
            start = np.full((len(mask), 1), asked.tokens.decoder_start, np.int64)
            answers += [self.tokenizer.decode(row) for row in generate(state, start, options)]
        return answers

    def rank_answers(
        self,
        images: Pictures,
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
        asked = self._answer_settings()
        tokens = asked.tokens
        if isinstance(candidates, str) or not candidates:
            raise UsageError("a ranking needs a list of candidates", got=repr(candidates))
        if rank_k < 1:
            raise UsageError("rank_k must be at least 1", got=str(rank_k))
        rows = tuple((tokens.decoder_start, *row[1:]) for row in self.tokenizer.encode_rows(candidates))
        ranked: list[list[RankedAnswer]] = []
        for states, mask in self._question_states(images, questions, clean, truncate, batch_size, progress):
            ranked += rank_candidates(
                self._decoder_state(states, mask),
                Candidates(tuple(candidates), rows),
                k=rank_k,
                pad_token_id=tokens.pad,
                label_smoothing=asked.label_smoothing,
            )
        return ranked

    def _answer_settings(self) -> AnswerSpec:
        return self._asked(AnswerSpec, "answer questions", _CHECKPOINT)

    def _answer_options(
        self, asked: AnswerSpec, beams: int | None, max_length: int | None, min_length: int | None
    ) -> GenerationOptions:
        longest = given_or(max_length, asked.max_length)
        options = GenerationOptions(
            eos_token_ids=(asked.tokens.sep,),
            pad_token_id=asked.tokens.pad,
            beams=given_or(beams, asked.beams),
            max_length=longest,
            min_length=shortest_length(min_length, asked.min_length, longest),
        )
        options.end_length(1)
        return self._checked(options)

    def _question_states(
        self,
        images: Pictures,
        questions: str | Sequence[str],
        clean: bool | None,
        truncate: bool,
        batch_size: int,
        progress: bool,
    ) -> Iterator[tuple[Array, IdArray]]:
        """Batches of questions that have seen their pictures: states float32 (B, T, H) and mask int64 (B, T)."""
        asked = self._answer_settings()
        sources, sentences, count = paired(images, questions)
        convention = asked.question_first_token
        if convention == "enc" if clean is None else clean:
            sentences = [clean_question(text) for text in sentences]
        rows = self._rows(sentences, asked.tokens.first(convention), asked.max_question_tokens, truncate=truncate)
        rows = rows * count if len(rows) == 1 else rows
        for batch, seen in self._picture_rows(sources, count, batch_size, progress=progress):
            ids, mask = self.tokenizer.pad_masked([rows[i] for i in batch])
            feeds = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": seen[HIDDEN]}
            yield self._run(ENCODER, feeds)[HIDDEN], mask
