"""The encoder pair of a bundle: pictures and texts to unit-length embeddings in one space, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engine import Engine
from vlm_export.runtime.engine_choice import ONNXRUNTIME, EngineName, chosen_precision, engine_choice
from vlm_export.runtime.given import Pictures, Unreadable, decoder_threads, map_pictures, picture_list, text_list
from vlm_export.runtime.identity import SLICING, model_identity
from vlm_export.runtime.image import MAX_PIXELS, FloatArray, PictureSource, preprocess_image
from vlm_export.runtime.reopening import Reopening, reopening
from vlm_export.runtime.text import Tokenizer
from vlm_export.runtime.token_ids import checked_ids, checked_mask
from vlm_export.runtime.vectors import batches, run_encoder, softmax_rows, takes_mask, unit_rows
from vlm_export.specs import ImageSpec, TextSpec

IMAGE_BATCH_SIZE = 16
TEXT_BATCH_SIZE = 64
_MAX_LOG_SCALE = 100.0


def load(
    path: str | Path,
    *,
    precision: str | None = None,
    engine: EngineName = ONNXRUNTIME,
    providers: str | Sequence[str] | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> EncoderPair:
    """Open a bundle: a `VisionLanguage` where texts attend to pictures, a `VisionChat` where a decoder reads both.

    Both have an EncoderPair's methods; those that the bundle has no parts for raise InputError.

    Args:
        path: the bundle's directory.
        precision: the variant of all parts; None: float32, or the only one that the bundle has.
        engine: what runs the graphs; "openvino" needs the extra of that name, and runs on the CPU.
        providers: ONNX Runtime's execution providers in order of preference, one name or several; the CPU by default.
        threads: of one operator, and of picture decoding; None for as many as there are cores (decoding: 4).
        max_pixels: pictures with more are refused before they are decoded; those that Pillow has opened are not.

    Raises:
        InputError: no bundle, a damaged one, or one that `load_slice_encoder` opens. The graphs are checked when they
            are first used.
        UsageError: the bundle has no variant of that precision, or an option is out of its range.
        EnvironmentFailure: on first use, where an engine or a provider is missing.
    """
    bundle = open_bundle(Path(path))
    return _kind_of(bundle)(
        bundle, precision=precision, engine=engine, providers=providers, threads=threads, max_pixels=max_pixels
    )


class EncoderPair:
    """Encodes pictures and texts; each graph is opened on first use. Made by `load`.

    It can be pickled, also after use: a worker gets the bundle's path and the options, and opens it again.
    """

    def __init__(
        self,
        bundle: OpenBundle,
        *,
        precision: str | None = None,
        engine: EngineName = ONNXRUNTIME,
        providers: str | Sequence[str] | None = None,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._check_kind(bundle)
        self.bundle = bundle
        self.precision = chosen_precision(bundle.manifest, precision)
        self.max_pixels = max_pixels
        self._engine_choice = engine_choice(engine, providers, threads)

    def __reduce__(self) -> Reopening:
        return reopening(self, self._engine_choice)

    @property
    def manifest(self) -> Manifest:
        """All that the bundle says about itself."""
        return self.bundle.manifest

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime's execution providers in order of preference."""
        return self._engine_choice.providers

    @property
    def threads(self) -> int | None:
        """Of one operator, and of picture decoding; None for the default."""
        return self._engine_choice.threads

    @property
    def image_spec(self) -> ImageSpec:
        """How pictures become pixels; InputError when the bundle takes none, or cuts them into tiles."""
        if self.manifest.image is None:
            raise InputError("this bundle takes no pictures", where=self.manifest.name)
        return self.manifest.image

    @property
    def text_spec(self) -> TextSpec:
        """How texts become token ids; InputError when the bundle takes none."""
        if self.manifest.text is None:
            raise InputError("this bundle takes no texts", where=self.manifest.name)
        return self.manifest.text

    @property
    def embed_dim(self) -> int:
        """D of the embeddings; InputError when the bundle makes none."""
        shape = self.manifest.parts[0].signature.outputs[0].shape
        size = shape[-1] if shape else None
        if not isinstance(size, int):
            raise InputError(
                "the embeddings have no fixed size", where=self.manifest.name, expected="(batch, D)", got=str(shape)
            )
        return size

    @property
    def logit_scale(self) -> float:
        """Factor on cosines before the softmax; the manifest stores its logarithm, as checkpoints do.

        Raises:
            InputError: the model has none: it was not trained to give a picture's labels probabilities.
        """
        stored = self.manifest.facts.get("logit_scale")
        if stored is None:
            raise InputError(
                "this model has no scale for probabilities",
                where=self.manifest.name,
                expected="a logit_scale in the manifest's facts, as bundles of CLIP have",
                got=f"none, of {self.manifest.family}",
                fix="use match (BLIP for retrieval): the probability of each text; or compare the embeddings' cosines",
            )
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
        """The vision graph; opening it checks its files. InputError when the bundle has none."""
        return self._engine("vision")

    @cached_property
    def text(self) -> Engine:
        """The text graph; opening it checks its files. InputError when the bundle has none."""
        return self._engine("text")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; InputError when it was exported without one."""
        return Tokenizer(self._tokenizer_file(), self.text_spec)

    def encode_image(
        self,
        images: Pictures,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: bool = False,
        unreadable: Unreadable | None = None,
    ) -> FloatArray:
        """Embeddings of pictures, one or a sequence of them: Pillow pictures, paths, bytes of files, open files, or
        arrays uint8 (H, W, 3).

        Args:
            unreadable: called with the number of each picture that cannot be read and its InputError, which it may
                raise; where it does not, the picture has no row.

        Returns:
            float32 (N, D), rows of unit length.

        Raises:
            InputError: a picture is unreadable or too large; the message names it.
        """
        sources = picture_list(images)
        embeddings, done = self._no_rows(len(sources)), 0
        with (
            decoder_threads(self.threads) as decoders,
            tqdm(total=len(sources), unit="picture", disable=not progress) as bar,
        ):
            for batch in batches(range(len(sources)), batch_size):
                pixels = self._pixels([sources[i] for i in batch], decoders, first=batch[0], unreadable=unreadable)
                if len(pixels):
                    embeddings[done : done + len(pixels)] = run_encoder(self.vision, pixels, width=self.embed_dim)
                    done += len(pixels)
                bar.update(len(batch))
        return unit_rows(embeddings[:done])

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
        sources = text_list(texts)
        tokenizer = self.tokenizer
        embeddings = self._no_rows(len(sources))
        with tqdm(total=len(sources), unit="text", disable=not progress) as bar:
            rows = tokenizer.encode_rows(sources, truncate=truncate)
            by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for batch in batches(by_length, batch_size):
                ids, mask = tokenizer.pad_masked([rows[i] for i in batch], pad_to=self._fixed_tokens())
                embeddings[list(batch)] = run_encoder(self.text, ids, mask, width=self.embed_dim)
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
        ids = checked_ids(input_ids, self.text_spec)
        mask = np.ones_like(ids)
        if attention_mask is not None:
            if not takes_mask(self.text):
                raise UsageError(
                    "this model takes no attention_mask",
                    where=self.manifest.name,
                    fix="leave it out: padding after end-of-text changes nothing",
                )
            mask = checked_mask(attention_mask, ids)
        if not len(ids):
            return self._no_rows()
        return unit_rows(run_encoder(self.text, ids, mask, width=self.embed_dim))

    def classify(
        self, images: Pictures, labels: Sequence[str], *, template: str = "a photo of a {}", truncate: bool = False
    ) -> FloatArray:
        """Zero-shot probabilities of each label for each picture: softmax of the scaled cosines.

        Args:
            template: the sentence around a label, with `{}` in its place.

            truncate: as in `encode_text`.

        Returns:
            float32 (N, L), rows add up to 1.

        Raises:
            InputError: as in `encode_image`, `encode_text` and `logit_scale`.
            UsageError: there are no labels, or the template lacks `{}`.
        """
        names = [] if isinstance(labels, str) else text_list(labels)
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError("classification needs a list of labels", got=repr(labels))
        if "{}" not in template:
            raise UsageError("the template lacks {}", expected="'a photo of a {}'", got=repr(template))
        texts = self.encode_text([template.replace("{}", name) for name in names], truncate=truncate)
        scale = self.logit_scale
        return softmax_rows(scale * (self.encode_image(images) @ texts.T))

    @staticmethod
    def _check_kind(bundle: OpenBundle) -> None:
        """InputError when this class is not made for a bundle."""
        if SLICING in bundle.manifest.facts:
            raise InputError(
                "this bundle holds no encoder pair: it makes features of a picture's slices, for a language model",
                where=bundle.manifest.name,
                expected="a bundle of CLIP, BLIP or nanoVLM",
                got=bundle.manifest.family,
                fix="vlm-export embed writes the features, inspect IMAGE --bundle DIR shows the slices; "
                "in Python: vlm_export.load_slice_encoder(DIR)",
            )

    def _engine(self, part: str) -> Engine:
        return self._engine_choice.open_part(self.bundle, part, self.precision)

    def _pixels(
        self,
        sources: Sequence[PictureSource],
        decoders: ThreadPoolExecutor,
        first: int,
        unreadable: Unreadable | None = None,
    ) -> FloatArray:
        """float32 (B, 3, S, S) of pictures, without those left out; arguments and errors as in `map_pictures`."""
        spec = self.image_spec
        # The graph first: it shows whether it takes pictures of this size, before they are made that large.
        _ = self.vision
        pictures = map_pictures(
            lambda image, name: preprocess_image(image, spec, name=name),
            sources,
            decoders,
            max_pixels=self.max_pixels,
            first=first,
            unreadable=unreadable,
        )
        return np.stack(pictures) if pictures else np.zeros((0, 3, spec.size_pixels, spec.size_pixels), np.float32)

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
