"""What captions, answers and matches have in common: a bundle's parts by name, pictures in batches, rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import MANIFEST_NAME
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engine import Array, Engine
from vlm_export.runtime.given import Pictures, Unreadable, decoder_threads, picture_list, text_list
from vlm_export.runtime.image import FloatArray, PictureSource
from vlm_export.runtime.language_settings import FirstToken, LanguageSettings, settings_from_facts
from vlm_export.runtime.pair import IMAGE_BATCH_SIZE, TEXT_BATCH_SIZE, EncoderPair
from vlm_export.runtime.text import Tokenizer
from vlm_export.runtime.vectors import batches, run_in_float32

HIDDEN, IMAGE_EMBEDS, TEXT_EMBEDS = "last_hidden_state", "image_embeds", "text_embeds"
Asked = TypeVar("Asked")


class Multimodal(EncoderPair):
    """A bundle with parts that attend to pictures."""

    @cached_property
    def settings(self) -> LanguageSettings:
        """What the manifest says about texts that attend to pictures; InputError when it says nothing."""
        where = str(self.bundle.root / MANIFEST_NAME)
        return settings_from_facts(self.manifest.facts, self.text_spec.vocab_size, where)

    @cached_property
    def vision(self) -> Engine:
        """As in EncoderPair; captions and matches run the same graph."""
        return self.engine("vision")

    @cached_property
    def text(self) -> Engine:
        """As in EncoderPair; matches run the same graph."""
        return self.engine("text")

    @property
    def embed_dim(self) -> int:
        """As in EncoderPair; InputError when the checkpoint has no projection to embeddings."""
        self._require_output("vision", IMAGE_EMBEDS)
        return super().embed_dim

    def encode_image(
        self,
        images: Pictures,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: bool = False,
        unreadable: Unreadable | None = None,
    ) -> FloatArray:
        """As in EncoderPair; InputError when the checkpoint has no projection to embeddings."""
        self._require_output("vision", IMAGE_EMBEDS)
        return super().encode_image(images, batch_size=batch_size, progress=progress, unreadable=unreadable)

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = TEXT_BATCH_SIZE,
        truncate: bool = False,
        progress: bool = False,
    ) -> FloatArray:
        """As in EncoderPair; InputError when the checkpoint has no projection to embeddings."""
        self._require_output("text", TEXT_EMBEDS)
        return super().encode_text(texts, batch_size=batch_size, truncate=truncate, progress=progress)

    def engine(self, part: str) -> Engine:
        """The graph of a part, opened on first use; InputError when the bundle has no such part."""
        if part not in self._engines:
            self._engines[part] = self._engine(part)
        return self._engines[part]

    @cached_property
    def _engines(self) -> dict[str, Engine]:
        return {}

    def _has(self, part: str) -> bool:
        return any(record.name == part for record in self.manifest.parts)

    def _asked(
        self, read: Callable[[LanguageSettings], Asked | None], part: str, ability: str, checkpoint: str
    ) -> Asked:
        """The settings of an ability that needs a part, when the bundle has both.

        Raises:
            InputError: it has not; the message says which kind of checkpoint has.
        """
        settings = read(self.settings) if self._has(part) else None
        if settings is None:
            raise InputError(
                f"this bundle cannot {ability}",
                where=self.manifest.name,
                expected=f"a part {part} and its settings",
                got=", ".join(record.name for record in self.manifest.parts),
                fix=f"export {checkpoint}",
            )
        return settings

    def _require_output(self, part: str, name: str) -> None:
        has_it = self._has(part) and name in self.manifest.part(part).signature.output_names
        if not has_it:
            raise InputError(
                "this bundle has no embeddings",
                where=self.manifest.name,
                expected=f"a part {part} with the output {name}",
                got=", ".join(record.name for record in self.manifest.parts),
                fix="export a checkpoint for retrieval, such as Salesforce's model_base_retrieval_coco.pth",
            )

    def _run(self, part: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """A part's outputs by name, as float32."""
        return run_in_float32(self.engine(part), feeds)

    def _picture_rows(
        self, sources: Sequence[PictureSource], count: int, batch_size: int, *, progress: bool = False
    ) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """Row numbers below `count`, and what the vision part returns for the pictures of those rows.

        A single picture serves all rows and is encoded once.
        """
        with (
            decoder_threads(self.threads) as decoders,
            tqdm(total=count, unit="picture", disable=not progress) as bar,
        ):
            shared: dict[str, Array] | None = None
            for batch in batches(range(count), batch_size):
                if len(sources) == 1 and count > 1:
                    shared = shared or self._seen(decoders, sources, 0)
                    seen = {name: np.repeat(array, len(batch), axis=0) for name, array in shared.items()}
                else:
                    seen = self._seen(decoders, [sources[i] for i in batch], batch[0])
                yield list(batch), seen
                bar.update(len(batch))

    def _seen(self, decoders: ThreadPoolExecutor, sources: Sequence[PictureSource], first: int) -> dict[str, Array]:
        return self._run("vision", {"pixel_values": self._pixels(sources, decoders, first)})

    def _rows(
        self, texts: Sequence[str], convention: FirstToken, max_tokens: int, *, truncate: bool = False
    ) -> list[list[int]]:
        """Token ids of texts, each with the convention's first token; errors as in `Tokenizer.encode_rows`."""
        first = self.settings.tokens.first(convention)
        return [[first, *row[1:]] for row in self._tokenizer_up_to(max_tokens).encode_rows(texts, truncate=truncate)]

    def _tokenizer_up_to(self, max_tokens: int) -> Tokenizer:
        if max_tokens >= self.text_spec.context_length:
            return self.tokenizer
        if max_tokens not in self._tokenizers:
            path, spec = self.bundle.file(TOKENIZER_NAME), replace(self.text_spec, context_length=max_tokens)
            self._tokenizers[max_tokens] = Tokenizer(path, spec)
        return self._tokenizers[max_tokens]

    @cached_property
    def _tokenizers(self) -> dict[int, Tokenizer]:
        return {}


def paired(images: Pictures, texts: str | Sequence[str]) -> tuple[list[PictureSource], list[str], int]:
    """Pictures, texts and the number of pairs: item by item, where one of either may stand for all of the other's.

    Raises:
        UsageError: two different numbers above one.
    """
    sources, sentences = picture_list(images), text_list(texts)
    sizes = {len(sources), len(sentences)}
    if len(sizes - {1}) > 1:
        raise UsageError(
            "pictures and texts do not pair up",
            expected="as many texts as pictures, or one of either",
            got=f"{len(sources)} pictures and {len(sentences)} texts",
        )
    count = min(sizes) if 0 in sizes else max(sizes)
    return sources, sentences, count
