"""Answers of a decoder-only vision-language model: images and a question in one prompt, words as they come.

Source: huggingface/nanoVLM, `VisionLanguageModel.generate` and `generate.py` (v0.1 6ba9082, v0.2 731d8c6, 4e0c096).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from vlm_export.runtime.engines.onnxruntime import batches
from vlm_export.runtime.generation.embedding_decoder import EmbeddedDecoderState
from vlm_export.runtime.generation.loop import generate, stream
from vlm_export.runtime.generation.options import GenerationOptions, IdArray, padded_ids
from vlm_export.runtime.generation.text_stream import TextStream
from vlm_export.runtime.inputs.progress import progress_bar
from vlm_export.runtime.inputs.sources import Images, image_list
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.chat_rows import ChatRow, ChatRows, RowImages, image_tuple, paired_rows
from vlm_export.specs.tasks import ChatSpec

CAPTION_QUESTION = "What is this?"
"""What the original's `generate.py` asks unless told otherwise, in all its versions."""

CHAT_BATCH_SIZE = 4


class ChatTask:
    """Answers questions about images, and captions them.

    Rows of a batch do not depend on one another: each is answered as if it were alone.
    """

    def __init__(self, session: Session, spec: ChatSpec) -> None:
        self.session, self.spec = session, spec
        self.rows = ChatRows(session, spec)

    def answer(
        self,
        images: RowImages | Sequence[RowImages],
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
            images: one entry per question: an image, a sequence of images that the question is about, or None for
                no image. One entry may serve all questions (it is encoded once), one question all entries.
            max_new_tokens: None for the manifest's, the default of the original's script. An answer ends sooner where
                the model's context does.
            sample: draw tokens, as the original's script does; otherwise the most probable one is taken each time.
            temperature, top_k, top_p: of the draws; None for the manifest's. top_k 0 and top_p 1 keep all tokens.
            seed: of the draws; a question draws the same in every batch.
            stop_at_end: end at an end token. The first generation's script decodes on.
            truncate: cut the end of a question where the prompt is too long instead of raising.
            batch_size: questions at a time.

        Raises:
            InputError: an image is unreadable, a prompt is longer than the context, or its placeholders do not match
                its images.
            UsageError: an option is out of its range, the numbers do not pair up, or the layout takes another number of
                images.
        """
        options = self._options(max_new_tokens, sample, temperature, top_k, top_p, seed, stop_at_end)
        entries, sentences = paired_rows(images, questions)
        shared = self.rows.features(entries[0]) if len(entries) < len(sentences) else None
        answers: list[str] = []
        with progress_bar(len(sentences), "answer", shown=progress) as bar:
            for batch in batches(range(len(sentences)), batch_size):
                part = slice(batch[0], batch[-1] + 1)
                rows = self.rows.question_rows(
                    entries[part],
                    sentences[part],
                    shared=shared,
                    first=batch[0],
                    first_image=sum(map(len, entries[: batch[0]])),
                    truncate=truncate,
                )
                answers += [self._text(ids) for ids in self._generated(rows, options, batch[0])]
                bar.update(len(batch))
        return answers

    def stream_answer(
        self,
        images: RowImages,
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

        Pieces are complete: none ends inside a character. Calling it reads the images and checks the prompt,
        iterating runs the decoder. Arguments and errors are those of `answer`.
        """
        options = self._options(max_new_tokens, sample, temperature, top_k, top_p, seed, stop_at_end)
        rows = self.rows.question_rows([image_tuple(images)], [question], truncate=truncate)
        return self._pieces(rows, options)

    def caption(
        self,
        images: Images,
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
        """What the model says about each image: the answer to `prompt`, or else to CAPTION_QUESTION.

        Other arguments and errors are those of `answer`.
        """
        sources = [(image,) for image in image_list(images)]
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
        images: Sequence[RowImages],
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
            images: the images of each row, as in `answer`.
            prompts: token ids of each row, a placeholder for each feature among them where the layout has them.
            cached: False computes everything again at each step, to prove the cache.

        Raises:
            As `answer`.
        """
        options = self._options(max_new_tokens, sample, temperature, top_k, top_p, seed, stop_at_end)
        rows = self.rows.id_rows([image_tuple(entry) for entry in images], prompts)
        return self._generated(rows, options, 0, cached=cached)

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
        chat = self.spec
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
            sampling_order=chat.sampling.order,
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
        text = TextStream(self.session.tokenizer.decode)
        limited = _up_to(options, self._room(rows[0], options))
        for token in stream(self._state(rows), prompt, limited):
            piece = text.push(token.token_id, is_last=token.is_last)
            if piece:
                yield piece

    def _state(self, rows: Sequence[ChatRow], *, cached: bool = True) -> EmbeddedDecoderState:
        return EmbeddedDecoderState(
            self.session.engine(self.spec.decoder),
            self.session.engine(self.spec.embed_tokens),
            self.rows.prompts(rows),
            cached=cached,
        )

    def _room(self, row: ChatRow, options: GenerationOptions) -> int:
        """New tokens until the context ends; the last one is never fed."""
        return min(options.max_new_tokens or 1, self.spec.context_length - row.length + 1)

    def _text(self, ids: Sequence[int]) -> str:
        return self.session.tokenizer.decode(ids).strip()


def _left_ids(rows: Sequence[ChatRow], options: GenerationOptions) -> IdArray:
    """Ids of the rows, int64 (B, T), padded on the left as their embeddings are."""
    return padded_ids([row.ids[::-1] for row in rows], options)[:, ::-1]


def _up_to(options: GenerationOptions, room: int) -> GenerationOptions:
    return replace(options, max_new_tokens=room)
