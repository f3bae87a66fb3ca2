"""The encoder pair of a bundle: pictures and texts to unit-length embeddings in one space, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engine import CPU, Engine, OrtEngine
from vlm_export.runtime.identity import SLICING, model_identity
from vlm_export.runtime.image import MAX_PIXELS, FloatArray, PictureSource, open_image, preprocess_image
from vlm_export.runtime.text import Tokenizer
from vlm_export.runtime.vectors import batches, run_encoder, softmax_rows, takes_mask, unit_rows
from vlm_export.specs import ImageSpec, TextSpec

Pictures: TypeAlias = "PictureSource | Sequence[PictureSource]"
IMAGE_BATCH_SIZE = 16
TEXT_BATCH_SIZE = 64
_DECODER_THREADS = 4
_MAX_LOG_SCALE = 100.0


def load(
    path: str | Path,
    *,
    precision: str | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> EncoderPair:
    """Open a bundle: a `VisionLanguage` where texts attend to pictures, a `VisionChat` where a decoder reads both.

    Both are EncoderPairs too.

    Args:
        path: the bundle's directory.
        precision: the variant of all parts; None: float32, or the only one that the bundle has.
        providers: ONNX Runtime's execution providers in order of preference; the CPU by default.
        threads: of one operator, and of picture decoding; None for as many as there are cores (decoding: 4).
        max_pixels: pictures with more are refused before they are decoded.

    Raises:
        InputError: no bundle, a damaged one, or one that `load_slice_encoder` opens. The graphs are checked when they
            are first used.
    """
    bundle = open_bundle(Path(path))
    return _kind_of(bundle)(
        bundle,
        precision=precision,
        providers=tuple(providers or (CPU,)),
        threads=threads,
        max_pixels=max_pixels,
    )


class EncoderPair:
    """Encodes pictures and texts; each graph is opened on first use. Made by `load`."""

    def __init__(
        self,
        bundle: OpenBundle,
        *,
        precision: str | None = None,
        providers: Sequence[str] = (CPU,),
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        _refuse_slices(bundle)
        self.bundle = bundle
        self.precision = precision or bundle.manifest.default_precision()
        self.providers = tuple(providers)
        self.threads = threads
        self.max_pixels = max_pixels

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def image_spec(self) -> ImageSpec:
        if self.manifest.image is None:
            raise InputError("this bundle takes no pictures", where=self.manifest.name)
        return self.manifest.image

    @property
    def text_spec(self) -> TextSpec:
        if self.manifest.text is None:
            raise InputError("this bundle takes no texts", where=self.manifest.name)
        return self.manifest.text

    @property
    def embed_dim(self) -> int:
        """D of the embeddings."""
        size = self.manifest.parts[0].signature.outputs[0].shape[-1]
        if not isinstance(size, int):
            raise InputError("the embeddings have no fixed size", where=self.manifest.name, got=str(size))
        return size

    @property
    def logit_scale(self) -> float:
        """Factor on cosines before the softmax; the manifest stores its logarithm, as checkpoints do."""
        stored = self.manifest.facts.get("logit_scale")
        if isinstance(stored, bool) or not isinstance(stored, int | float) or not abs(stored) <= _MAX_LOG_SCALE:
            raise InputError(
                "the manifest has no usable logit_scale",
                where=self.manifest.name,
                expected="a number",
                got=repr(stored),
            )
        return math.exp(stored)

    @cached_property
    def identity(self) -> str:
        """sha256 that names the model: equal for bundles of one checkpoint, whatever their opset or precision."""
        return model_identity(self.manifest)

    @cached_property
    def vision(self) -> Engine:
        """The vision graph; opening it checks its files."""
        return self._engine("vision")

    @cached_property
    def text(self) -> Engine:
        """The text graph; opening it checks its files."""
        return self._engine("text")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; InputError when it was exported without one."""
        return Tokenizer(self._tokenizer_file(), self.text_spec)

    def encode_image(
        self, images: Pictures, *, batch_size: int = IMAGE_BATCH_SIZE, progress: bool = False
    ) -> FloatArray:
        """Embeddings of pictures: PIL pictures, paths, or bytes of picture files; one or a sequence of them.

        Returns:
            float32 (N, D), rows of unit length.

        Raises:
            InputError: a picture is unreadable or too large; the message names it.
        """
        sources = [images] if isinstance(images, Image.Image | str | Path | bytes) else list(images)
        embeddings = self._no_rows(len(sources))
        with (
            ThreadPoolExecutor(self.threads or _DECODER_THREADS) as decoders,
            tqdm(total=len(sources), unit="picture", disable=not progress) as bar,
        ):
            for batch in batches(range(len(sources)), batch_size):
                pixels = list(decoders.map(lambda i: self._prepared_picture(i, sources[i]), batch))
                embeddings[list(batch)] = run_encoder(self.vision, np.stack(pixels))
                bar.update(len(batch))
        return unit_rows(embeddings)

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = TEXT_BATCH_SIZE,
        truncate: bool = False,
        progress: bool = False,
    ) -> FloatArray:
        """Embeddings of texts; short ones are batched with short ones, so that none pays for another's length.

        Args:
            truncate: cut texts above the context length instead of raising.

        Returns:
            float32 (N, D), rows of unit length, in the order of `texts`.

        Raises:
            InputError: a text is too long (the message names it), or the bundle has no tokenizer.
        """
        sources = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = self.tokenizer
        embeddings = self._no_rows(len(sources))
        with tqdm(total=len(sources), unit="text", disable=not progress) as bar:
            rows = tokenizer.encode_rows(sources, truncate=truncate)
            by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for batch in batches(by_length, batch_size):
                ids, mask = tokenizer.pad_masked([rows[i] for i in batch], pad_to=self._fixed_tokens())
                embeddings[list(batch)] = run_encoder(self.text, ids, mask)
                bar.update(len(batch))
        return unit_rows(embeddings)

    def encode_ids(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> FloatArray:
        """Embeddings of token ids, for bundles without a tokenizer.

        Args:
            input_ids: integers (N, T) with start and end tokens, 1 ≤ T ≤ context length.
            attention_mask: 1 for tokens and 0 for padding, (N, T), where the text part takes one; None for all ones.

        Returns:
            float32 (N, D), rows of unit length.

        Raises:
            InputError: ids or mask do not fit the model.
            UsageError: a mask for a model that takes none.
        """
        spec = self.text_spec
        ids = np.asarray(input_ids)
        fits = ids.ndim == 2 and ids.dtype.kind in "iu" and 1 <= ids.shape[1] <= spec.context_length
        if not fits or (ids.size and not 0 <= ids.min() <= ids.max() < spec.vocab_size):
            raise InputError(
                "token ids do not fit the model",
                expected=f"integers (N, T), T from 1 to {spec.context_length}, each in [0, {spec.vocab_size})",
                got=f"{ids.dtype} {ids.shape}" + (f", {ids.min()} to {ids.max()}" if fits else ""),
            )
        mask = self._checked_mask(ids, attention_mask)
        if not len(ids):
            return self._no_rows()
        return unit_rows(run_encoder(self.text, ids.astype(np.int64), mask))

    def classify(
        self, images: Pictures, labels: Sequence[str], *, template: str = "a photo of a {}", truncate: bool = False
    ) -> FloatArray:
        """Zero-shot probabilities of each label for each picture: softmax of the scaled cosines.

        Args:
            template: the sentence around a label, with `{}` in its place.

        Returns:
            float32 (N, L), rows add up to 1.
        """
        if isinstance(labels, str) or not labels:
            raise UsageError("classification needs a list of labels", got=repr(labels))
        if "{}" not in template:
            raise UsageError("the template lacks {}", expected="'a photo of a {}'", got=repr(template))
        texts = self.encode_text([template.replace("{}", label) for label in labels], truncate=truncate)
        logits = self.logit_scale * (self.encode_image(images) @ texts.T)
        return softmax_rows(logits)

    def _checked_mask(self, ids: npt.NDArray[Any], given: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
        """int64 like `ids`."""
        if given is None:
            return np.ones(ids.shape, dtype=np.int64)
        if not takes_mask(self.text):
            raise UsageError(
                "this model takes no attention_mask",
                where=self.manifest.name,
                fix="leave it out: padding after end-of-text changes nothing",
            )
        mask = np.asarray(given)
        fits = mask.shape == ids.shape and mask.dtype.kind in "biu" and bool(np.isin(mask, (0, 1)).all())
        if not fits or not mask.any(axis=1).all():
            raise InputError(
                "the attention mask does not fit the token ids",
                expected=f"zeros and ones {ids.shape}, a one in every row",
                got=f"{mask.dtype} {mask.shape}" + (", a row of zeros" if fits else ""),
            )
        return mask.astype(np.int64)

    def _engine(self, part: str) -> Engine:
        variant = self.manifest.part(part).variant(self.precision)
        return OrtEngine(self.bundle.model_files(variant), providers=self.providers, threads=self.threads)

    def _prepared_picture(self, index: int, source: PictureSource) -> FloatArray:
        name = f"picture {index}" if isinstance(source, Image.Image | bytes) else str(source)
        image = source if isinstance(source, Image.Image) else open_image(source, max_pixels=self.max_pixels, name=name)
        return preprocess_image(image, self.image_spec, name=name)

    def _tokenizer_file(self) -> Path:
        if TOKENIZER_NAME not in self.manifest.files:
            raise InputError(
                "this bundle has no tokenizer",
                where=self.manifest.name,
                expected=TOKENIZER_NAME,
                fix="export again with --tokenizer PATH, or work with token ids (encode_ids, generate_ids)",
            )
        return self.bundle.file(TOKENIZER_NAME)

    def _fixed_tokens(self) -> int | None:
        axis = self.text.inputs[0].shape[1]
        return axis if isinstance(axis, int) else None

    def _no_rows(self, count: int = 0) -> FloatArray:
        return np.zeros((count, self.embed_dim), dtype=np.float32)


def _kind_of(bundle: OpenBundle) -> type[EncoderPair]:
    # Imported here: they build on this module.
    from vlm_export.runtime.chat_inputs import is_chat
    from vlm_export.runtime.vision_chat import VisionChat
    from vlm_export.runtime.vision_language import LANGUAGE_PARTS, VisionLanguage

    if is_chat(bundle.manifest):
        return VisionChat
    attends = any(part.name in LANGUAGE_PARTS for part in bundle.manifest.parts)
    return VisionLanguage if attends else EncoderPair


def _refuse_slices(bundle: OpenBundle) -> None:
    if SLICING in bundle.manifest.facts:
        raise InputError(
            "this bundle holds no encoder pair: it makes features of a picture's slices, for a language model",
            where=bundle.manifest.name,
            expected="a bundle of CLIP, BLIP or nanoVLM",
            got=bundle.manifest.family,
            fix="vlm-export embed writes the features, inspect IMAGE --bundle DIR shows the slices; "
            "in Python: vlm_export.load_slice_encoder(DIR)",
        )
