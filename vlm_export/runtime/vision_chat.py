"""Answers of a decoder-only vision-language model: pictures and a question in one prompt, words as they come.

Source: huggingface/nanoVLM, `VisionLanguageModel.generate` and `generate.py` (v0.1 6ba9082, v0.2 731d8c6, 4e0c096).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError
from vlm_export.runtime.chat_inputs import ChatInputs, ChatRow, RowPictures, paired_rows, picture_tuple, row_ends
from vlm_export.runtime.embedded_decoder import EmbeddedDecoderState
from vlm_export.runtime.engine_choice import ONNXRUNTIME, EngineName
from vlm_export.runtime.generation import GenerationOptions, generate, padded_ids, stream
from vlm_export.runtime.generation_options import IdArray
from vlm_export.runtime.given import Pictures, Unreadable, picture_list, text_list
from vlm_export.runtime.image import MAX_PIXELS, FloatArray
from vlm_export.runtime.pair import IMAGE_BATCH_SIZE, TEXT_BATCH_SIZE
from vlm_export.runtime.text_stream import TextStream
from vlm_export.runtime.vectors import batches, unit_rows

CAPTION_QUESTION = "What is this?"
"""What the original's `generate.py` asks unless told otherwise, in all its versions."""

CHAT_BATCH_SIZE = 4


class VisionChat(ChatInputs):
    """Answers questions about pictures, and captions them. Made by `load` and `load_vision_chat`.

    Of an EncoderPair's members, `vision`, `text`, `encode_ids`, `classify` and `logit_scale` raise InputError: no part
    and no training of such a model has anything to do with them.

    Rows of a batch do not depend on one another: each is answered as if it were alone.
    """

    def answer(
        self,
        images: RowPictures | Sequence[RowPictures],
        questions: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_at_end: bool = True,
        truncate: bool = False,
        batch_size: int = CHAT_BATCH_SIZE,
        progress: bool = False,
    ) -> list[str]:
        """An answer to each question, without white space around it.

        Args:
            images: one entry per question: a picture, a sequence of pictures that the question is about, or None for
                no picture. One entry may serve all questions (it is encoded once), one question all entries.
            max_new_tokens: None for the manifest's, the default of the original's script. An answer ends sooner where
                the model's context does.
            sample: draw tokens, as the original's script does; otherwise the most probable one is taken each time.
            temperature, top_k, top_p: of the draws; None for the manifest's. top_k 0 and top_p 1 keep all tokens.
            seed: of the draws; a question draws the same in every batch.
            stop_at_end: end at an end token. The first generation's script decodes on.
            truncate: cut the end of a question where the prompt is too long instead of raising.
            batch_size: questions at a time.

        Raises:
            InputError: a picture is unreadable, a prompt is longer than the context, or its placeholders do not match
                its pictures.
            UsageError: an option is out of its range, the numbers do not pair up, or the layout takes another number of
                pictures.
        """
        options = self._options(max_new_tokens, sample, temperature, top_k, top_p, seed, stop_at_end)
        entries, sentences = paired_rows(images, questions)
        shared = self.features(entries[0]) if len(entries) < len(sentences) else None
        answers: list[str] = []
        with tqdm(total=len(sentences), unit="answer", disable=not progress) as bar:
            for batch in batches(range(len(sentences)), batch_size):
                part = slice(batch[0], batch[-1] + 1)
                rows = self.question_rows(
                    entries[part],
                    sentences[part],
                    shared=shared,
                    first=batch[0],
                    first_picture=sum(map(len, entries[: batch[0]])),
                    truncate=truncate,
                )
                answers += [self._text(ids) for ids in self._generated(rows, options, batch[0])]
                bar.update(len(batch))
        return answers

    def stream_answer(
        self,
        images: RowPictures,
        question: str,
        *,
        max_new_tokens: int | None = None,
        sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_at_end: bool = True,
        truncate: bool = False,
    ) -> Iterator[str]:
        """The answer to one question in pieces, as they come; together they are what `answer` returns.

        Pieces are complete: none ends inside a character. Calling it reads the pictures and checks the prompt,
        iterating runs the decoder. Arguments and errors are those of `answer`.
        """
        options = self._options(max_new_tokens, sample, temperature, top_k, top_p, seed, stop_at_end)
        rows = self.question_rows([picture_tuple(images)], [question], truncate=truncate)
        return self._pieces(rows, options)

    def caption(
        self,
        images: Pictures,
        *,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        batch_size: int = CHAT_BATCH_SIZE,
        progress: bool = False,
    ) -> list[str]:
        """What the model says about each picture: the answer to `prompt`, or else to CAPTION_QUESTION.

        Other arguments and errors are those of `answer`.
        """
        sources = [(picture,) for picture in picture_list(images)]
        return self.answer(
            sources,
            [CAPTION_QUESTION if prompt is None else prompt] * len(sources),
            max_new_tokens=max_new_tokens,
            sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    def generate_ids(
        self,
        images: Sequence[RowPictures],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_at_end: bool = True,
        cached: bool = True,
    ) -> list[list[int]]:
        """The new token ids of each row, its end token included, all rows in one batch.

        Args:
            images: the pictures of each row, as in `answer`.
            prompts: token ids of each row, a placeholder for each feature among them where the layout has them.
            cached: False computes everything again at each step, to prove the cache.

        Raises:
            As `answer`.
        """
        options = self._options(max_new_tokens, sample, temperature, top_k, top_p, seed, stop_at_end)
        rows = self.id_rows([picture_tuple(entry) for entry in images], prompts)
        return self._generated(rows, options, 0, cached=cached)

    def encode_image(
        self,
        images: Pictures,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: bool = False,
        unreadable: Unreadable | None = None,
    ) -> FloatArray:
        """The mean of each picture's features as the decoder reads them, float32 (N, D), unit length.

        Nothing was trained to make these comparable with texts: see `similarity`.
        """
        sources = picture_list(images)
        rows, done = self._no_rows(len(sources)), 0
        with tqdm(total=len(sources), unit="picture", disable=not progress) as bar:
            for batch in batches(range(len(sources)), batch_size):
                for _, features in self.features([sources[i] for i in batch], batch[0], unreadable):
                    rows[done] = features.reshape(-1, features.shape[-1]).mean(axis=0, dtype=np.float64)
                    done += 1
                bar.update(len(batch))
        return unit_rows(rows[:done])

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = TEXT_BATCH_SIZE,
        truncate: bool = False,
        progress: bool = False,
    ) -> FloatArray:
        """The mean of each text's token embeddings, float32 (N, D), unit length; InputError when a text has none."""
        sources = text_list(texts)
        ids = self.tokenizer.encode_rows(sources, truncate=truncate)
        if not all(ids):
            where = f"text {next(i for i, row in enumerate(ids) if not row)}"
            raise InputError("an empty text has no embedding", where=where, expected="at least one token")
        rows = self._no_rows(len(sources))
        with tqdm(total=len(sources), unit="text", disable=not progress) as bar:
            for batch in batches(range(len(ids)), batch_size):
                own = [ids[i] for i in batch]
                words = np.split(self.embedded([token for row in own for token in row]), row_ends(own))
                rows[list(batch)] = [row.mean(axis=0, dtype=np.float64) for row in words]
                bar.update(len(batch))
        return unit_rows(rows)

    def similarity(self, images: Pictures, texts: str | Sequence[str]) -> FloatArray:
        """Cosines of `encode_image` and `encode_text`, float32 (N, M).

        An untrained measure: both lie in the decoder's input space, but the model was trained to write, not to compare.
        """
        cosines: FloatArray = self.encode_image(images) @ self.encode_text(texts).T
        return cosines

    def _options(
        self,
        max_new_tokens: int | None,
        sample: bool,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        stop_at_end: bool,
    ) -> GenerationOptions:
        chat = self.chat
        if sample:
            temperature = chat.sampling.temperature if temperature is None else temperature
            top_k = chat.sampling.top_k if top_k is None else (top_k or None)
            top_p = chat.sampling.top_p if top_p is None else top_p
        return GenerationOptions(
            eos_token_ids=chat.eos_token_ids if stop_at_end else (),
            pad_token_id=chat.pad_token_id,
            max_new_tokens=chat.max_new_tokens if max_new_tokens is None else max_new_tokens,
            sample=sample,
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=top_p,
            sampling_rule="nanovlm",
            seed=seed,
        )

    def _generated(
        self, rows: Sequence[ChatRow], options: GenerationOptions, first_row: int, *, cached: bool = True
    ) -> list[list[int]]:
        """New ids of each row. Rows for which the context leaves less room are decoded apart."""
        generated: list[list[int]] = []
        for room, group in groupby(rows, lambda row: self._room(row, options)):
            together = list(group)
            prompt = _left_ids(together, options)
            found = generate(
                self._state(together, cached=cached),
                prompt,
                _up_to(options, room),
                first_row=first_row + len(generated),
            )
            generated += [row[prompt.shape[1] :] for row in found]
        return generated

    def _pieces(self, rows: Sequence[ChatRow], options: GenerationOptions) -> Iterator[str]:
        prompt = _left_ids(rows, options)
        text = TextStream(self.tokenizer.decode)
        limited = _up_to(options, self._room(rows[0], options))
        for token in stream(self._state(rows), prompt, limited):
            piece = text.push(token.token_id, is_last=token.is_last)
            if piece:
                yield piece

    def _state(self, rows: Sequence[ChatRow], *, cached: bool = True) -> EmbeddedDecoderState:
        return EmbeddedDecoderState(self.decoder, self.embed_tokens, self.prompts(rows), cached=cached)

    def _room(self, row: ChatRow, options: GenerationOptions) -> int:
        """New tokens until the context ends; the last one is never fed."""
        return min(options.max_new_tokens or 1, self.chat.context_length - row.length + 1)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).strip()


def _left_ids(rows: Sequence[ChatRow], options: GenerationOptions) -> IdArray:
    """Ids of the rows, int64 (B, T), padded on the left as their embeddings are."""
    return padded_ids([row.ids[::-1] for row in rows], options)[:, ::-1]


def _up_to(options: GenerationOptions, room: int) -> GenerationOptions:
    return replace(options, max_new_tokens=room)


def load_vision_chat(
    path: str | Path,
    *,
    precision: str | None = None,
    engine: EngineName = ONNXRUNTIME,
    providers: str | Sequence[str] | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> VisionChat:
    """Opens a bundle to talk with about pictures; arguments and errors as in `vlm_export.load`."""
    return VisionChat(
        open_bundle(Path(path)),
        precision=precision,
        engine=engine,
        providers=providers,
        threads=threads,
        max_pixels=max_pixels,
    )
