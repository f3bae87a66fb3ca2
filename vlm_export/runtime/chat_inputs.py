"""From pictures and questions to the embeddings that a decoder-only model starts with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.size_check import check_image_size
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.chat_prompt import ChatTokenizer, PromptForm, PromptWriter
from vlm_export.runtime.chat_settings import CHAT, TILES, ChatSettings, chat_settings_from_facts
from vlm_export.runtime.embedded_decoder import EMBEDS, IDS, EmbeddedRows, left_padded
from vlm_export.runtime.engine import Engine
from vlm_export.runtime.given import Unreadable, decoder_threads, map_pictures, picture_list, text_list
from vlm_export.runtime.image import FloatArray, PictureSource, preprocess_image
from vlm_export.runtime.pair import EncoderPair
from vlm_export.runtime.tiling import Grid, cut_tiles
from vlm_export.runtime.vectors import batches, run_in_float32

VISION, EMBED_TOKENS, DECODER = "vision_encoder", "embed_tokens", "decoder"
PIXELS, FEATURES = "pixel_values", "image_features"
TILE_BATCH_SIZE = 4
"""Tiles in one run of the vision part: attention over a tile of 512 pixels takes 50 MB for each."""

RowPictures: TypeAlias = "PictureSource | Sequence[PictureSource] | None"
Seen: TypeAlias = "tuple[Grid, FloatArray]"
"""A picture's grid, and its features float32 (tiles, L, D)."""


class PreparedPicture(NamedTuple):
    """A picture's grid, and its tiles float32 (tiles, 3, S, S); (1, 1) and one without tiles."""

    grid: Grid
    tiles: FloatArray


@dataclass(frozen=True)
class ChatRow:
    """One prompt.

    Attributes:
        ids: token ids, placeholders included.
        pictures: features of each picture, float32 (tiles, L, D), in the order of the placeholders.
        prepended: features that stand before the embeddings of the ids.
    """

    ids: list[int]
    pictures: tuple[FloatArray, ...]
    prepended: int

    @property
    def length(self) -> int:
        """Positions of the decoder that it takes."""
        return len(self.ids) + self.prepended


class ChatInputs(EncoderPair):
    """A bundle with a vision part, an embedding of tokens and a decoder that reads both."""

    @staticmethod
    def _check_kind(bundle: OpenBundle) -> None:
        EncoderPair._check_kind(bundle)
        if not is_chat(bundle.manifest):
            raise InputError(
                "this bundle holds no model to talk with",
                where=bundle.manifest.name,
                expected=f"a part {DECODER} and its settings",
                got=", ".join(part.name for part in bundle.manifest.parts),
                fix="export a checkpoint of nanoVLM; vlm_export.load opens every other bundle with pictures and texts",
            )

    @cached_property
    def chat(self) -> ChatSettings:
        """What the manifest says about prompts and answers; InputError when it contradicts itself."""
        where = str(self.bundle.root / MANIFEST_NAME)
        settings = chat_settings_from_facts(self.manifest.facts, self.text_spec.vocab_size, where)
        if settings.tiles is None and self.manifest.image is None:
            raise InputError("the manifest does not say how pictures are prepared", where=where, fix="export again")
        if settings.tiles is not None:
            part, stated = self.manifest.part(VISION), f"{where}: facts.{TILES}"
            for tensor in part.signature.inputs:
                check_image_size(part, tensor, settings.tiles.tile_size_pixels, stated)
        return settings

    @cached_property
    def vision_encoder(self) -> Engine:
        """The graph from pixels to features; opening it checks its files."""
        return self._engine(VISION)

    @cached_property
    def embed_tokens(self) -> Engine:
        """The graph from token ids to embeddings; opening it checks its files."""
        return self._engine(EMBED_TOKENS)

    @cached_property
    def decoder(self) -> Engine:
        """The graph from embeddings to logits; opening it checks its files."""
        return self._engine(DECODER)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The bundle's tokenizer; InputError when it was exported without one."""
        return ChatTokenizer(self._tokenizer_file(), self.text_spec)

    @cached_property
    def form(self) -> PromptForm:
        """How prompts look; needs no tokenizer."""
        return PromptForm(self.chat)

    @cached_property
    def writer(self) -> PromptWriter:
        """Writes prompts."""
        return PromptWriter(self.tokenizer, self.chat, str(self.bundle.root / TOKENIZER_NAME))

    @property
    def logit_scale(self) -> float:
        """InputError: nothing was trained to compare pictures with texts."""
        raise InputError(
            "this model was not trained to compare pictures with texts",
            where=self.manifest.name,
            expected="a bundle of CLIP",
            got=self.manifest.family,
            fix="ask it a question instead",
        )

    def prepare(
        self, sources: Sequence[PictureSource], first: int = 0, unreadable: Unreadable | None = None
    ) -> list[PreparedPicture]:
        """Pictures as the vision part takes them; InputError when one is unreadable or too large, by its name.

        Args:
            first: the number of the first one, in the names of pictures that have no path.
            unreadable: as in `map_pictures`.
        """
        if sources:
            # The graph first: it shows whether it takes pictures of this size, before they are made that large.
            _ = self.vision_encoder
        with decoder_threads(self.threads) as decoders:
            return map_pictures(
                self._prepared, sources, decoders, max_pixels=self.max_pixels, first=first, unreadable=unreadable
            )

    def features(
        self, sources: Sequence[PictureSource], first: int = 0, unreadable: Unreadable | None = None
    ) -> list[Seen]:
        """The grid of each picture and its features; arguments and errors as in `prepare`."""
        prepared = self.prepare(sources, first, unreadable)
        return [(picture.grid, features) for picture, features in zip(prepared, self._see(prepared), strict=True)]

    def embedded(self, ids: Sequence[int]) -> FloatArray:
        """Embeddings of token ids, float32 (T, D)."""
        found: FloatArray = run_in_float32(self.embed_tokens, {IDS: np.array([ids], np.int64)})[EMBEDS][0]
        return found

    def question_rows(
        self,
        entries: Sequence[tuple[PictureSource, ...]],
        questions: Sequence[str],
        *,
        shared: Sequence[Seen] | None = None,
        first: int = 0,
        first_picture: int = 0,
        truncate: bool = False,
    ) -> list[ChatRow]:
        """A prompt for each question.

        Args:
            entries: the pictures of each question; left aside with `shared`.
            shared: what was seen of pictures that all questions are about.
            first, first_picture: numbers of the first question and picture, in errors.
            truncate: as in `PromptWriter.ids`.

        Raises:
            As `VisionChat.answer`. Prompts are checked before the vision part runs.
        """

        def ids(row: int, grids: Sequence[Grid]) -> list[int]:
            return self.writer.ids(questions[row], grids, truncate=truncate, name=f"question {first + row}")

        if shared is None:
            return self._rows_of(entries, ids, first_picture)
        grids = [grid for grid, _ in shared]
        return [self._row(ids(i, grids), shared) for i in range(len(questions))]

    def id_rows(self, entries: Sequence[tuple[PictureSource, ...]], prompts: Sequence[Sequence[int]]) -> list[ChatRow]:
        """Prompts from token ids; errors as in `VisionChat.generate_ids`."""
        if len(entries) != len(prompts):
            raise UsageError(
                "pictures and prompts do not pair up",
                expected="as many entries of pictures as prompts",
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
        if not row.pictures:
            return words
        features = np.concatenate([picture.reshape(-1, picture.shape[-1]) for picture in row.pictures])
        if row.prepended:
            return np.concatenate([features, words])
        placed: FloatArray = words.copy()
        placed[np.array(row.ids) == self.chat.image_token_id] = features
        return placed

    def _rows_of(
        self,
        entries: Sequence[tuple[PictureSource, ...]],
        ids: Callable[[int, Sequence[Grid]], list[int]],
        first_picture: int = 0,
    ) -> list[ChatRow]:
        """All pictures are read and all prompts checked, then the pictures are seen."""
        prepared = self.prepare([picture for entry in entries for picture in entry], first_picture)
        pictures = iter(prepared)
        own = [[next(pictures) for _ in entry] for entry in entries]
        written = [ids(i, [picture.grid for picture in entry]) for i, entry in enumerate(own)]
        features = iter(self._see(prepared))
        return [
            self._row(row, [(picture.grid, next(features)) for picture in entry])
            for row, entry in zip(written, own, strict=True)
        ]

    def _row(self, ids: list[int], seen: Sequence[Seen]) -> ChatRow:
        grids = [grid for grid, _ in seen]
        return ChatRow(ids, tuple(features for _, features in seen), self.form.prepended(grids))

    def _see(self, prepared: Sequence[PreparedPicture]) -> list[FloatArray]:
        """Features of each picture, float32 (tiles, L, D); all tiles share batches."""
        if not prepared:
            return []
        tiles = np.concatenate([picture.tiles for picture in prepared])
        runs = [self._features_of(tiles[list(batch)]) for batch in batches(range(len(tiles)), TILE_BATCH_SIZE)]
        ends = np.cumsum([len(picture.tiles) for picture in prepared])[:-1]
        return np.split(np.concatenate(runs), ends)

    def _features_of(self, tiles: FloatArray) -> FloatArray:
        features: FloatArray = run_in_float32(self.vision_encoder, {PIXELS: tiles})[FEATURES]
        if features.ndim != 3 or features.shape[:2] != (len(tiles), self.chat.tokens_per_tile):
            raise InputError(
                "the vision part returned another number of features than the manifest says",
                where=self.manifest.name,
                expected=f"({len(tiles)}, {self.chat.tokens_per_tile}, D)",
                got=str(features.shape),
                fix="export the bundle again",
            )
        return features

    def _prepared(self, image: Image.Image, name: str) -> PreparedPicture:
        if self.chat.tiles is None:
            return PreparedPicture((1, 1), preprocess_image(image, self.image_spec, name=name)[None])
        whole = self.chat.global_image_token is not None
        plan, tiles = cut_tiles(image, self.chat.tiles, with_global=whole, name=name)
        return PreparedPicture(plan.grid, tiles)

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        vocab_size = self.text_spec.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise InputError(
                "token ids do not fit the model",
                where=name,
                expected=f"at least one id, each in [0, {vocab_size})",
                got=f"{min(ids)} to {max(ids)}" if ids else "none",
            )


def is_chat(manifest: Manifest) -> bool:
    """Whether a bundle is a decoder-only model that `load_vision_chat` opens."""
    return CHAT in manifest.facts and any(part.name == DECODER for part in manifest.parts)


def picture_tuple(images: RowPictures) -> tuple[PictureSource, ...]:
    """The pictures of one entry."""
    if images is None:
        return ()
    return tuple(picture_list(images))


def paired_rows(
    images: RowPictures | Sequence[RowPictures], questions: str | Sequence[str]
) -> tuple[list[tuple[PictureSource, ...]], list[str]]:
    """Entries of pictures and questions, one of each per row, or a single entry for all rows.

    Raises:
        UsageError: two different numbers above one.
    """
    given: Any = images  # mypy cannot know that `picture_list` tells one from several
    entries = [picture_tuple(entry) for entry in ([None] if images is None else picture_list(given))]
    sentences = text_list(questions)
    if len(sentences) == 1:
        sentences *= len(entries)
    if len(entries) not in (1, len(sentences)):
        raise UsageError(
            "pictures and questions do not pair up",
            expected="as many questions as entries of pictures, or one of either",
            got=f"{len(entries)} entries of pictures and {len(sentences)} questions",
            fix="several pictures for one question are one entry: [[first, second]]",
        )
    return entries, sentences


def row_ends(rows: Sequence[Sequence[int]]) -> list[int]:
    """Where each row but the last ends among the ids of all rows."""
    return [int(end) for end in np.cumsum([len(row) for row in rows])[:-1]]
