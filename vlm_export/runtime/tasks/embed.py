"""Images and texts to unit-length embeddings in one space, and the probabilities of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import batches
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.patches import pack_patches, patch_length
from vlm_export.runtime.inputs.progress import progress_bar
from vlm_export.runtime.inputs.sources import Images, Unreadable, decoder_threads, image_list, text_list
from vlm_export.runtime.inputs.texts import checked_ids, checked_mask
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.prepared_images import PreparedImage, image_features, prepare_images
from vlm_export.specs import PatchSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

IMAGE_BATCH_SIZE = 16
TEXT_BATCH_SIZE = 64
_MASK = "attention_mask"


class EmbedTask:
    """Encodes images and texts, and compares them."""

    def __init__(self, session: Session, spec: EmbedSpec) -> None:
        self.session, self.spec = session, spec

    @property
    def embed_dim(self) -> int:
        """D of the embeddings."""
        encoder = self.spec.image or self.spec.text
        assert encoder is not None
        return self._width(encoder)

    @property
    def score(self) -> ScoreSpec:
        """How cosines become probabilities; InputError when the model was not trained for that."""
        if self.spec.score is None:
            raise InputError(
                "this model has no scale for probabilities: it was not trained to score an image's labels",
                where=self.session.manifest.name,
                expected="a score of the task embed in the manifest",
                got="none",
                fix="use match, where the bundle has it; or compare the embeddings' cosines",
            )
        return self.spec.score

    def encode_image(
        self,
        images: Images,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: bool = False,
        unreadable: Unreadable | None = None,
    ) -> FloatArray:
        """Embeddings of images, one or a sequence of them: Pillow images, paths, bytes of files, open files, or
        arrays uint8 (H, W, 3).

        Args:
            unreadable: called with the number of each image that cannot be read and its InputError, which it may
                raise; where it does not, the image has no row.

        Returns:
            float32 (N, D), rows of unit length.

        Raises:
            InputError: an image is unreadable or too large (the message names it), or the bundle encodes no images.
        """
        sources, encoder = image_list(images), self._encoder("image")
        embeddings, done = self._no_rows(len(sources)), 0
        with (
            decoder_threads(self.session.threads) as decoders,
            progress_bar(len(sources), "image", shown=progress) as bar,
        ):
            for batch in batches(range(len(sources)), batch_size):
                prepared = prepare_images(
                    self.session,
                    encoder.part,
                    [sources[i] for i in batch],
                    decoders,
                    first=batch[0],
                    unreadable=unreadable,
                )
                if prepared:
                    embeddings[done : done + len(prepared)] = self._image_rows(encoder, prepared)
                    done += len(prepared)
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
            InputError: a text is too long or has no tokens (the message names it), or the bundle has no tokenizer or
                encodes no texts.
        """
        sources, encoder = text_list(texts), self._encoder("text")
        tokenizer = self.session.tokenizer
        embeddings = self._no_rows(len(sources))
        with progress_bar(len(sources), "text", shown=progress) as bar:
            rows = tokenizer.encode_rows(sources, truncate=truncate)
            by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for batch in batches(by_length, batch_size):
                chosen = [rows[i] for i in batch]
                if encoder.pooling == "mean":
                    embeddings[list(batch)] = self._mean_of_tokens(encoder, chosen, batch)
                else:
                    ids, mask = tokenizer.pad_masked(chosen, pad_to=self._least_tokens(encoder))
                    embeddings[list(batch)] = self._text_rows(encoder, ids, mask)
                bar.update(len(batch))
        return unit_rows(embeddings)

    def encode_ids(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> FloatArray:
        """Embeddings of token ids, for bundles without a tokenizer.

        Args:
            input_ids: integers (N, T) with start and end tokens, 1 ≤ T ≤ context length; filled up with the padding
                token where the model was trained so, or its graph has one length.
            attention_mask: 1 for tokens and 0 for padding, (N, T), where the text part takes one
                or the embedding is a mean; None for all ones.

        Returns:
            float32 (N, D), rows of unit length.

        Raises:
            InputError: ids or mask do not fit the model.
            UsageError: a mask for a model that takes none.
        """
        encoder, ids = self._encoder("text"), checked_ids(input_ids, self.session.text_spec)
        mask = np.ones_like(ids)
        if attention_mask is not None:
            if encoder.pooling != "mean" and _MASK not in self._input_names(encoder):
                raise UsageError(
                    "this model takes no attention_mask",
                    where=self.session.manifest.name,
                    fix="leave it out: padding after end-of-text changes nothing",
                )
            mask = checked_mask(attention_mask, ids)
        if not len(ids):
            return self._no_rows()
        if encoder.pooling == "mean":
            rows = [row[kept.astype(bool)].tolist() for row, kept in zip(ids, mask, strict=True)]
            return unit_rows(self._mean_of_tokens(encoder, rows, range(len(rows))))
        missing = ((0, 0), (0, max(self._least_tokens(encoder) - ids.shape[1], 0)))
        ids = np.pad(ids, missing, constant_values=self.session.text_spec.pad_token_id)
        return unit_rows(self._text_rows(encoder, ids, np.pad(mask, missing)))

    def classify(
        self, images: Images, labels: Sequence[str], *, template: str = "a photo of a {}", truncate: bool = False
    ) -> FloatArray:
        """Zero-shot probabilities of each label for each image, from the scaled cosines.

        Args:
            template: the sentence around a label, with `{}` in its place.
            truncate: as in `encode_text`.

        Returns:
            float32 (N, L). With the score "softmax" rows add up to 1; with "sigmoid" each label stands by itself.

        Raises:
            InputError: as in `encode_image`, `encode_text` and `score`.
            UsageError: there are no labels, or the template lacks `{}`.
        """
        names = [] if isinstance(labels, str) else text_list(labels)
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError("classification needs a list of labels", got=repr(labels))
        if "{}" not in template:
            raise UsageError("the template lacks {}", expected="'a photo of a {}'", got=repr(template))
        score = self.score
        texts = self.encode_text([template.replace("{}", name) for name in names], truncate=truncate)
        return probabilities(self.encode_image(images) @ texts.T, score)

    def similarity(self, images: Images, texts: str | Sequence[str]) -> FloatArray:
        """Cosines of `encode_image` and `encode_text`, float32 (N, M)."""
        cosines: FloatArray = self.encode_image(images) @ self.encode_text(texts).T
        return cosines

    def _image_rows(self, encoder: EncoderSpec, prepared: Sequence[PreparedImage]) -> FloatArray:
        """float32 (B, D) of images, not yet of unit length."""
        if encoder.pooling == "mean":
            features = image_features(self.session, encoder.part, encoder.output, prepared)
            means = [rows.reshape(-1, rows.shape[-1]).mean(axis=0, dtype=np.float64) for rows in features]
            return np.array(means, np.float32)
        spec = self.session.image_spec
        if isinstance(spec, PatchSpec):
            length = patch_length([self.session.manifest.part(encoder.part).signature])
            feeds = pack_patches([image.tiles[0] for image in prepared], spec, length)
        else:
            (name,) = self._input_names(encoder)
            feeds = {name: np.concatenate([image.tiles for image in prepared])}
        rows = self.session.run(encoder.part, feeds)[encoder.output]
        return checked_rows(rows, len(prepared), self.embed_dim, encoder.output)

    def _text_rows(self, encoder: EncoderSpec, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> FloatArray:
        """float32 (B, D) of token ids, not yet of unit length."""
        names = self._input_names(encoder)
        feeds = {names[0]: ids, **({_MASK: mask} if _MASK in names else {})}
        rows = self.session.run(encoder.part, feeds)[encoder.output]
        return checked_rows(rows, len(ids), self.embed_dim, encoder.output)

    def _mean_of_tokens(
        self, encoder: EncoderSpec, rows: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> FloatArray:
        """float32 (B, D): the mean of each row's token embeddings; rows share one run without padding."""
        for number, row in zip(numbers, rows, strict=True):
            if not row:
                where = f"text {number}"
                raise InputError("an empty text has no embedding", where=where, expected="at least one token")
        (name,) = self._input_names(encoder)
        ids = np.array([[token for row in rows for token in row]], np.int64)
        words = self.session.run(encoder.part, {name: ids})[encoder.output][0]
        ends = np.cumsum([len(row) for row in rows])[:-1]
        return np.array([own.mean(axis=0, dtype=np.float64) for own in np.split(words, ends)], np.float32)

    def _encoder(self, kind: str) -> EncoderSpec:
        encoder = self.spec.image if kind == "image" else self.spec.text
        if encoder is None:
            raise InputError(
                f"this bundle encodes no {kind}s",
                where=self.session.manifest.name,
                expected=f"an encoder of {kind}s",
                got=", ".join(part.name for part in self.session.manifest.parts),
                fix="export the checkpoint's other part too, or a checkpoint that has both towers",
            )
        return encoder

    def _input_names(self, encoder: EncoderSpec) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.session.engine(encoder.part).inputs)

    def _least_tokens(self, encoder: EncoderSpec) -> int:
        """The shortest row that the part takes."""
        axis = self.session.engine(encoder.part).inputs[0].shape[1]
        return axis if isinstance(axis, int) else self.session.text_spec.least_tokens

    def _width(self, encoder: EncoderSpec) -> int:
        outputs = {tensor.name: tensor for tensor in self.session.manifest.part(encoder.part).signature.outputs}
        shape = outputs[encoder.output].shape if encoder.output in outputs else ()
        size = shape[-1] if shape else None
        if not isinstance(size, int):
            where = f"{self.session.manifest.name}: part {encoder.part}: {encoder.output}"
            raise InputError("the embeddings have no fixed size", where=where, expected="(batch, D)", got=str(shape))
        return size

    def _no_rows(self, count: int = 0) -> FloatArray:
        return np.zeros((count, self.embed_dim), dtype=np.float32)


def checked_rows(rows: npt.NDArray[Any], count: int, width: int, output: str) -> FloatArray:
    """A graph's output as float32 (count, width).

    Raises:
        InputError: the graph returned another shape, or values that are not finite.
    """
    if rows.ndim != 2 or len(rows) != count:
        raise InputError("a graph returned no row per input", expected=f"({count}, D)", got=str(rows.shape))
    if rows.shape[1] != width:
        raise InputError(
            "a graph returned embeddings of another width than the manifest states",
            where=output,
            expected=f"({count}, {width})",
            got=str(rows.shape),
            fix="copy the bundle again, or export it again with --overwrite",
        )
    if not np.isfinite(rows).all():
        raise InputError(
            "a graph returned values that are not finite",
            expected="finite embeddings",
            got=f"{int((~np.isfinite(rows)).any(axis=1).sum())} of {len(rows)} rows with NaN or infinity",
            fix="use the fp32 variant, or verify the bundle on this machine",
        )
    return rows


def unit_rows(rows: FloatArray) -> FloatArray:
    """Rows divided by their lengths, which are summed in float64; a row of zeros stays zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: FloatArray = (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return unit


def softmax_rows(logits: npt.NDArray[Any]) -> FloatArray:
    """Softmax along the second axis, computed in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares: FloatArray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def probabilities(cosines: FloatArray, score: ScoreSpec) -> FloatArray:
    """What a score makes of cosines (N, L), float32 (N, L)."""
    # In float32, as the originals compute their logits.
    logits = np.float32(score.scale) * cosines + np.float32(score.logit_bias)
    if score.activation == "softmax":
        return softmax_rows(logits)
    # 1 / (1 + exp(-x)) without overflow.
    half: FloatArray = (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)
    return half
