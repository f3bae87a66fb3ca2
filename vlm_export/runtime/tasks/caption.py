"""Captions of images.

Source: `BLIP_Decoder.generate` of salesforce/BLIP (models/blip.py, 3a29b74). [DEC] takes the place of the prompt's
[CLS], its [SEP] is dropped, and what is decoded loses the prompt again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import IdArray
from vlm_export.runtime.inputs.sources import Images, image_list
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.attending import HIDDEN, beam_options, decoder_state, image_rows
from vlm_export.specs.tasks import CaptionSpec

# What the original samples with; top_k is the default of transformers 4.25, which it leaves alone.
SAMPLING_TOP_K, SAMPLING_TOP_P, SAMPLING_REPETITION_PENALTY = 50, 0.9, 1.1


class CaptionTask:
    """Writes a sentence about an image."""

    def __init__(self, session: Session, spec: CaptionSpec) -> None:
        self.session, self.spec = session, spec

    def caption(
        self,
        images: Images,
        *,
        prompt: str | None = None,
        beams: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        sample: bool = False,
        top_k: int = SAMPLING_TOP_K,
        top_p: float = SAMPLING_TOP_P,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        batch_size: int = 4,
        progress: bool = False,
    ) -> list[str]:
        """A sentence for each image. What is None comes from the manifest: the original's defaults.

        Args:
            prompt: how each sentence starts; it is cut off again.
            beams: 1 is greedy search.
            max_length, min_length: in tokens, [DEC] and the prompt's included.
            sample: draw tokens from the `top_k` most probable, up to a total probability of `top_p`.
            repetition_penalty: None is 1.1 with sampling and 1.0 without, as in the original.
            seed: of the draws; an image draws the same in every batch.
            batch_size: images at a time; the decoder holds a row for each beam of each of them.

        Raises:
            InputError: an image is unreadable, or the prompt is too long.
            UsageError: an option is out of its range, or the lengths leave no room after the prompt.
        """
        penalty = SAMPLING_REPETITION_PENALTY if sample else 1.0
        options = beam_options(
            self.session,
            self.spec,
            beams=beams,
            max_length=max_length,
            min_length=min_length,
            sample=sample,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=penalty if repetition_penalty is None else repetition_penalty,
            seed=seed,
        )
        prompt_ids = self.prompt_ids(prompt)
        options.end_length(len(prompt_ids))
        sources = image_list(images)
        captions: list[str] = []
        rows_of_images = image_rows(
            self.session, self.spec.vision, sources, len(sources), batch_size, progress=progress
        )
        for batch, seen in rows_of_images:
            states = seen[HIDDEN]
            state = decoder_state(self.session, self.spec, states, np.ones(states.shape[:2], np.int64))
            prompts: IdArray = np.tile(prompt_ids, (len(batch), 1))
            rows = generate(state, prompts, options, first_row=batch[0])
            captions += [self._without_prompt(row, len(prompt_ids)) for row in rows]
        return captions

    def prompt_ids(self, prompt: str | None = None) -> IdArray:
        """What decoding starts with, int64 (T,): [DEC] and the prompt's tokens; None for the manifest's prompt."""
        text = self.spec.prompt if prompt is None else prompt
        words = self.session.tokenizer.encode_rows([text])[0][1:-1]
        return np.array([self.spec.tokens.decoder_start, *words], np.int64)

    def _without_prompt(self, row: Sequence[int], prompt_length: int) -> str:
        """The text of the tokens after the prompt.

        The original drops as many characters as the prompt has. That is the same wherever a word follows the prompt
        and its text comes back as it was written; here it may also hold capitals, spaces and contractions.
        """
        prompt, text = self.session.tokenizer.decode(row[:prompt_length]), self.session.tokenizer.decode(row)
        if not text.startswith(prompt):
            text, prompt = self.session.tokenizer.decode(row[prompt_length:]), ""
        return text[len(prompt) :].strip()
