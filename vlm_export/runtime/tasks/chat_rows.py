"""From images and questions to the embeddings that a decoder-only model starts with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation.embedding_decoder import EMBEDS, IDS, EmbeddedRows, left_padded
from vlm_export.runtime.inputs.chat_prompt import PromptForm, PromptWriter
from vlm_export.runtime.inputs.images import FloatArray, ImageSource
from vlm_export.runtime.inputs.sources import decoder_threads, image_list, text_list
from vlm_export.runtime.inputs.tiles import Grid
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.prepared_images import PreparedImage, image_features, prepare_images
from vlm_export.specs.tasks import ChatSpec

FEATURES = "image_features"

RowImages: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
Seen: TypeAlias = "tuple[Grid, FloatArray]"
"""An image's grid, and its features float32 (tiles, L, D)."""


@dataclass(frozen=True)
class ChatRow:
    """One prompt.

    Attributes:
        ids: token ids, placeholders included.
        images: features of each image, float32 (tiles, L, D), in the order of the placeholders.
        prepended: features that stand before the embeddings of the ids.
    """

    ids: list[int]
    images: tuple[FloatArray, ...]
    prepended: int

    @property
    def length(self) -> int:
        """Positions of the decoder that it takes."""
        return len(self.ids) + self.prepended


class ChatRows:
    """Writes prompts, and turns them and their images into what a decoder starts with."""

    def __init__(self, session: Session, spec: ChatSpec) -> None:
        self.session, self.spec = session, spec

    @cached_property
    def form(self) -> PromptForm:
        """How prompts look; needs no tokenizer."""
        return PromptForm(self.spec)

    @cached_property
    def writer(self) -> PromptWriter:
        """Writes prompts."""
        return PromptWriter(self.session.tokenizer, self.spec, str(self.session.bundle.root / TOKENIZER_NAME))

    def prepare(self, sources: Sequence[ImageSource], first: int = 0) -> list[PreparedImage]:
        """Images as the vision part takes them; errors as in `prepare_images`."""
        with decoder_threads(self.session.threads) as decoders:
            return prepare_images(self.session, self.spec.vision, sources, decoders, first=first)

    def features(self, sources: Sequence[ImageSource], first: int = 0) -> list[Seen]:
        """The grid of each image and its features; errors as in `prepare`."""
        prepared = self.prepare(sources, first)
        return [(image.grid, features) for image, features in zip(prepared, self._see(prepared), strict=True)]

    def embedded(self, ids: Sequence[int]) -> FloatArray:
        """Embeddings of token ids, float32 (T, D)."""
        found: FloatArray = self.session.run(self.spec.embed_tokens, {IDS: np.array([ids], np.int64)})[EMBEDS][0]
        return found

    def question_rows(
        self,
        entries: Sequence[tuple[ImageSource, ...]],
        questions: Sequence[str],
        *,
        shared: Sequence[Seen] | None = None,
        first: int = 0,
        first_image: int = 0,
        truncate: bool = False,
    ) -> list[ChatRow]:
        """A prompt for each question.

        Args:
            entries: the images of each question; left aside with `shared`.
            shared: what was seen of images that all questions are about.
            first, first_image: numbers of the first question and image, in errors.
            truncate: as in `PromptWriter.ids`.

        Raises:
            As `ChatTask.answer`. Prompts are checked before the vision part runs.
        """

        def ids(row: int, grids: Sequence[Grid]) -> list[int]:
            return self.writer.ids(questions[row], grids, truncate=truncate, name=f"question {first + row}")

        if shared is None:
            return self._rows_of(entries, ids, first_image)
        grids = [grid for grid, _ in shared]
        return [self._row(ids(i, grids), shared) for i in range(len(questions))]

    def id_rows(self, entries: Sequence[tuple[ImageSource, ...]], prompts: Sequence[Sequence[int]]) -> list[ChatRow]:
        """Prompts from token ids; errors as in `ChatTask.generate_ids`."""
        if len(entries) != len(prompts):
            raise UsageError(
                "images and prompts do not pair up",
                expected="as many entries of images as prompts",
                got=f"{len(entries)} and {len(prompts)}",
            )

        def ids(row: int, grids: Sequence[Grid]) -> list[int]:
            given = [int(token) for token in prompts[row]]
            self._check_ids(given, f"prompt {row}")
            self.form.check(given, grids, f"prompt {row}")
            return given

        return self._rows_of(entries, ids)

    def prompts(self, rows: Sequence[ChatRow]) -> EmbeddedRows:
        """What the decoder starts with: features in their places, rows padded on the left."""
        words = np.split(
            self.embedded([token for row in rows for token in row.ids]), row_ends([row.ids for row in rows])
        )
        return left_padded([self._placed(row, own) for row, own in zip(rows, words, strict=True)])

    def _placed(self, row: ChatRow, words: FloatArray) -> FloatArray:
        """float32 (T, D) of one row."""
        if not row.images:
            return words
        features = np.concatenate([image.reshape(-1, image.shape[-1]) for image in row.images])
        if row.prepended:
            return np.concatenate([features, words])
        placed: FloatArray = words.copy()
        placed[np.array(row.ids) == self.spec.image_token_id] = features
        return placed

    def _rows_of(
        self,
        entries: Sequence[tuple[ImageSource, ...]],
        ids: Callable[[int, Sequence[Grid]], list[int]],
        first_image: int = 0,
    ) -> list[ChatRow]:
        """All images are read and all prompts checked, then the images are seen."""
        prepared = self.prepare([image for entry in entries for image in entry], first_image)
        images = iter(prepared)
        own = [[next(images) for _ in entry] for entry in entries]
        written = [ids(i, [image.grid for image in entry]) for i, entry in enumerate(own)]
        features = iter(self._see(prepared))
        return [
            self._row(row, [(image.grid, next(features)) for image in entry])
            for row, entry in zip(written, own, strict=True)
        ]

    def _row(self, ids: list[int], seen: Sequence[Seen]) -> ChatRow:
        grids = [grid for grid, _ in seen]
        return ChatRow(ids, tuple(features for _, features in seen), self.form.prepended(grids))

    def _see(self, prepared: Sequence[PreparedImage]) -> list[FloatArray]:
        """Features of each image, float32 (tiles, L, D)."""
        found = image_features(self.session, self.spec.vision, FEATURES, prepared)
        for features in found:
            if features.shape[1] != self.spec.tokens_per_tile:
                raise InputError(
                    "the vision part returned another number of features than the manifest says",
                    where=self.session.manifest.name,
                    expected=f"(tiles, {self.spec.tokens_per_tile}, D)",
                    got=str(features.shape),
                    fix="export the bundle again",
                )
        return found

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        vocab_size = self.session.text_spec.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise InputError(
                "token ids do not fit the model",
                where=name,
                expected=f"at least one id, each in [0, {vocab_size})",
                got=f"{min(ids)} to {max(ids)}" if ids else "none",
            )


def image_tuple(images: RowImages) -> tuple[ImageSource, ...]:
    """The images of one entry."""
    if images is None:
        return ()
    return tuple(image_list(images))


def paired_rows(
    images: RowImages | Sequence[RowImages], questions: str | Sequence[str]
) -> tuple[list[tuple[ImageSource, ...]], list[str]]:
    """Entries of images and questions, one of each per row, or a single entry for all rows.

    Raises:
        UsageError: two different numbers above one.
    """
    given: Any = images  # mypy cannot know that `image_list` tells one from several
    entries = [image_tuple(entry) for entry in ([None] if images is None else image_list(given))]
    sentences = text_list(questions)
    if len(sentences) == 1:
        sentences *= len(entries)
    if len(entries) not in (1, len(sentences)):
        raise UsageError(
            "images and questions do not pair up",
            expected="as many questions as entries of images, or one of either",
            got=f"{len(entries)} entries of images and {len(sentences)} questions",
            fix="several images for one question are one entry: [[first, second]]",
        )
    return entries, sentences


def row_ends(rows: Sequence[Sequence[int]]) -> list[int]:
    """Where each row but the last ends among the ids of all rows."""
    return [int(end) for end in np.cumsum([len(row) for row in rows])[:-1]]
