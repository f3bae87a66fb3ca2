"""Features of an image's slices, as MiniCPM-V's and OmniLMM's language models read them, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
from PIL import Image

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import Array, batches
from vlm_export.runtime.inputs.images import FloatArray, ImageSource
from vlm_export.runtime.inputs.progress import progress_bar
from vlm_export.runtime.inputs.slice_placeholder import PlaceholderPart, placeholder_parts, placeholder_text
from vlm_export.runtime.inputs.slice_plan import SlicePlan
from vlm_export.runtime.inputs.slices import IntArray, Slices, slice_image, stack_patches, whole_patches
from vlm_export.runtime.inputs.sources import Images, Unreadable, decoder_threads, image_list, map_images
from vlm_export.runtime.session import Session
from vlm_export.specs.slices import PlaceholderSpec, SliceSpec
from vlm_export.specs.tasks import FeatureSpec

SLICE_BATCH_SIZE = 4
TOKENS, VIDEO = "vision_tokens", "video_resampler"


@dataclass(frozen=True)
class SliceFeatures:
    """What stands for one image in a prompt.

    Attributes:
        plan: where it was cut.
        tgt_sizes: int64 (S, 2), rows and columns of patches of each slice.
        image_features: float32 (S, Q, D), the whole image first, then the grid row by row; D is the language model's.
        placeholder: the text around them.
    """

    plan: SlicePlan
    tgt_sizes: IntArray
    image_features: FloatArray
    placeholder: PlaceholderSpec

    def parts(self, *, image_index: int = 0) -> tuple[PlaceholderPart, ...]:
        """Text, and numbers of slices: there go the rows `image_features[number]`.

        Args:
            image_index: the image's place among those of the prompt.
        """
        return placeholder_parts(self.plan, self.placeholder, image_index=image_index)

    def text(self, *, image_index: int = 0) -> str:
        """`parts` with `query_token` in the place of each feature, as the originals tokenize it."""
        return placeholder_text(self.parts(image_index=image_index), self.placeholder)


class FeatureTask:
    """Encodes images slice by slice, for a language model that runs elsewhere."""

    def __init__(self, session: Session, task: FeatureSpec) -> None:
        self.session, self.task = session, task

    @property
    def spec(self) -> SliceSpec:
        """How images are cut."""
        spec = self.session.image_spec
        assert isinstance(spec, SliceSpec)
        return spec

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(Q, D): features of a slice, and their width."""
        shape = self.session.manifest.part(self.task.part).signature.outputs[0].shape
        queries, width = shape[1:] if len(shape) == 3 else (None, None)
        if queries != self.spec.placeholder.queries or not isinstance(width, int):
            expected = f"(batch, {self.spec.placeholder.queries}, D)"
            raise InputError(
                "features and placeholder differ", where=self.session.manifest.name, expected=expected, got=str(shape)
            )
        return self.spec.placeholder.queries, width

    def encode_slices(
        self,
        images: Images,
        *,
        batch_size: int = SLICE_BATCH_SIZE,
        progress: bool = False,
    ) -> list[SliceFeatures]:
        """Features of images, of what `EmbedTask.encode_image` takes; one or a sequence of them.

        Args:
            batch_size: slices that share a run of the graph: of all shapes where they are packed (2.5 and later), of
                one shape otherwise. It changes no feature by more than rounding, for 2.5 neither.

        Raises:
            InputError: an image is unreadable, too large or too thin; the message names it.
        """
        return list(self.stream_slices(images, batch_size=batch_size, progress=progress))

    def stream_slices(
        self,
        images: Images,
        *,
        batch_size: int = SLICE_BATCH_SIZE,
        progress: bool = False,
        unreadable: Unreadable | None = None,
    ) -> Iterator[SliceFeatures]:
        """As `encode_slices`, image by image: the features of many do not fit memory.

        Args:
            unreadable: as in `EmbedTask.encode_image`; called before any later image's features come.
        """
        sources = image_list(images)
        with (
            decoder_threads(self.session.threads) as decoders,
            progress_bar(len(sources), "image", shown=progress) as bar,
        ):
            for window in batches(range(len(sources)), batch_size):
                chosen = [sources[i] for i in window]
                cut = map_images(
                    self._cut,
                    chosen,
                    decoders,
                    max_pixels=self.session.max_pixels,
                    first=window[0],
                    unreadable=unreadable,
                )
                bar.update(len(chosen) - len(cut))
                if not cut:
                    continue
                features = self._features(cut, batch_size)
                for slices in cut:
                    count = len(slices.pixel_values)
                    yield SliceFeatures(slices.plan, slices.tgt_sizes, features[:count], self.spec.placeholder)
                    features = features[count:]
                    bar.update()

    def encode_video(
        self,
        frames: Sequence[ImageSource],
        temporal_ids: Sequence[Sequence[int]],
        *,
        batch_size: int = SLICE_BATCH_SIZE,
    ) -> FloatArray:
        """Features of a video's frames, of which each group becomes as much as one slice (MiniCPM-V 4.5).

        Args:
            frames: in the video's order; never cut.
            temporal_ids: for each group, when its frames were taken, in tenths of a second as the original counts;
                -1 for a frame without a time. The original makes groups of 3 and of up to 6.
            batch_size: frames that share a run of the encoder.

        Returns:
            float32 (groups, Q, D).

        Raises:
            InputError: the bundle knows no videos, or a frame is unreadable.
            UsageError: groups are empty, or have another number of frames in all.
        """
        self._require_video()
        groups = [list(group) for group in temporal_ids]
        if not all(groups) or sum(map(len, groups)) != len(frames):
            raise UsageError(
                "the groups do not fit the frames", expected=f"{len(frames)} ids in all, none empty", got=str(groups)
            )
        whole, start = replace(self.spec, max_slices=1), 0
        uncut = partial(self._cut, spec=whole)
        features = np.zeros((len(groups), *self.feature_shape), dtype=np.float32)
        with decoder_threads(self.session.threads) as decoders:
            for row, ids in zip(features, groups, strict=True):
                chosen = [frames[i] for i in range(start, start + len(ids))]
                cut = map_images(uncut, chosen, decoders, max_pixels=self.session.max_pixels, first=start)
                row[:] = self._group(cut, ids, batch_size)
                start += len(ids)
        return features

    def _group(self, cut: Sequence[Slices], ids: Sequence[int], batch_size: int) -> FloatArray:
        """float32 (Q, D) of the frames of one group."""
        pixels = stack_patches([slices.pixel_values[0] for slices in cut])
        sizes = np.concatenate([slices.tgt_sizes for slices in cut])
        tokens = [
            self._run(TOKENS, {"pixel_values": pixels[list(batch)], "tgt_sizes": sizes[list(batch)]})
            for batch in batches(range(len(cut)), batch_size)
        ]
        inputs = {"image_tokens": np.concatenate(tokens)[None], "tgt_sizes": sizes[None]}
        features: FloatArray = self._run(VIDEO, {**inputs, "temporal_ids": np.array([ids], dtype=np.int64)})[0]
        return features

    def _features(self, cut: Sequence[Slices], batch_size: int) -> FloatArray:
        """float32 (S, Q, D) of all slices of some images."""
        pixels = [array for slices in cut for array in slices.pixel_values]
        sizes = np.concatenate([slices.tgt_sizes for slices in cut])
        features = np.zeros((len(pixels), *self.feature_shape), dtype=np.float32)
        for batch in self._batches(pixels, batch_size):
            rows = self._run(self.task.part, self._inputs([pixels[i] for i in batch], sizes[list(batch)]))
            if rows.shape != (len(batch), *self.feature_shape):
                expected = str((len(batch), *self.feature_shape))
                raise InputError("a graph returned other features", expected=expected, got=str(rows.shape))
            features[list(batch)] = rows
        return features

    def _batches(self, pixels: Sequence[FloatArray], batch_size: int) -> Iterator[Sequence[int]]:
        """Numbers of slices; packed ones stand beside those of their length, since padding costs as patches do."""
        order = sorted(range(len(pixels)), key=lambda i: pixels[i].shape)
        if self._is_packed:
            yield from batches(order, batch_size)
        else:
            for _, same in groupby(order, key=lambda i: pixels[i].shape):
                yield from batches(list(same), batch_size)

    def _inputs(self, pixels: Sequence[FloatArray], sizes: IntArray) -> dict[str, Array]:
        if self._is_packed:
            return {"pixel_values": stack_patches(pixels), "tgt_sizes": sizes}
        return {"pixel_values": whole_patches(np.stack(pixels), self.spec.patch_size)}

    @property
    def _is_packed(self) -> bool:
        return self.spec.pixel_layout == "patches"

    def _cut(self, image: Image.Image, name: str, spec: SliceSpec | None = None) -> Slices:
        return slice_image(image, spec or self.spec, name=name)

    def _run(self, part: str, feeds: Mapping[str, Array]) -> FloatArray:
        """A part's output as float32, all of it finite."""
        engine = self.session.engine(part)
        output: FloatArray = self.session.run(part, feeds)[engine.outputs[0].name]
        if not np.isfinite(output).all():
            raise InputError(
                "a graph returned values that are not finite",
                where=f"part {part}",
                expected="finite features",
                fix="use the fp32 variant, or verify the bundle on this machine",
            )
        return output

    def _require_video(self) -> None:
        parts = [part.name for part in self.session.manifest.parts]
        if VIDEO not in parts:
            raise InputError(
                "this bundle knows no videos",
                where=self.session.manifest.name,
                expected=f"a part {VIDEO}",
                got=", ".join(parts),
                fix="encode the frames as images, or export a checkpoint that reads videos",
            )
