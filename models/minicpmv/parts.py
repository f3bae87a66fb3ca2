"""The Parts of MiniCPM-V's and OmniLMM's vision modules, with Signatures and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from vlm_export.family import Array, Part
from vlm_export.models.layers.navit import NavitEncoder
from vlm_export.models.layers.vit import VisionTransformer
from vlm_export.models.minicpmv.architecture import VisionArchitecture
from vlm_export.models.minicpmv.modules import (
    GridResampler,
    GridTokens,
    GridVision,
    PackedResampler,
    PackedVision,
    VideoResampler,
    VisionModules,
)
from vlm_export.specs.signature import Axis, Signature, TensorSpec

BATCH = Axis("batch")
# What is verified, in patches; graphs compute larger slices all the same. A square slice has 32 · 32. Sides: those of
# images up to twice as wide as high (47); verification takes a middle side and the largest together, 25 · 48. All:
# images up to a hundred times as wide as high give 1168.
_LARGEST_SIDE, _LARGEST_COUNT = 48, 1200
# What 4.5's preparation of videos packs into one group.
_LARGEST_GROUP = 6


def build_parts(architecture: VisionArchitecture, modules: VisionModules) -> Iterator[Part]:
    """`vision` as deployments use it, and its two halves for hosts that split there."""
    vision, resampler = modules.vision, modules.resampler
    if isinstance(vision, VisionTransformer):
        whole, tokens, features = GridVision(vision, resampler), GridTokens(vision), GridResampler(resampler)
        yield Part("vision", whole.eval(), *_grid_vision(architecture))
        yield Part("vision_tokens", tokens.eval(), *_grid_tokens(architecture))
        yield Part("resampler", features.eval(), *_grid_resampler(architecture))
        return
    assert isinstance(vision, NavitEncoder)
    yield Part("vision", PackedVision(vision, resampler).eval(), *_packed_vision(architecture))
    yield Part("vision_tokens", vision.eval(), *_packed_tokens(architecture))
    yield Part("resampler", PackedResampler(resampler).eval(), *_packed_resampler(architecture))
    if architecture.version == "4.5":
        yield Part("video_resampler", VideoResampler(resampler).eval(), *_video_resampler(architecture))


def _features(architecture: VisionArchitecture) -> TensorSpec:
    sizes = architecture.resampler
    return TensorSpec("image_features", "float32", ("batch", sizes.queries, sizes.width))


def _side_axes(architecture: VisionArchitecture, step: int) -> tuple[tuple[str, str], tuple[Axis, ...]]:
    """Names of the two sides, and their axes in steps; 1.0 and OmniLMM know squares only."""
    if architecture.resampler.positions == "stored":
        return ("side", "side"), (Axis("side", step, _LARGEST_SIDE * step, step),)
    names = ("height", "width") if step > 1 else ("rows", "columns")
    return names, tuple(Axis(name, step, _LARGEST_SIDE * step, step) for name in names)


def _grid_vision(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    (height, width), axes = _side_axes(architecture, architecture.vision.patch_size)
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, height, width))
    signature = Signature((pixels,), (_features(architecture),), (BATCH, *axes))
    return signature, NoiseExamples(signature)


def _grid_tokens(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    signature, _ = _grid_vision(architecture)
    tokens = TensorSpec("image_tokens", "float32", ("batch", "rows", "columns", architecture.vision.width))
    axes = (*signature.axes, Axis("rows"), Axis("columns"))
    signature = replace(signature, outputs=(tokens,), axes=axes)
    return signature, NoiseExamples(signature)


def _grid_resampler(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    (rows, columns), axes = _side_axes(architecture, 1)
    tokens = TensorSpec("image_tokens", "float32", ("batch", rows, columns, architecture.vision.width))
    signature = Signature((tokens,), (_features(architecture),), (BATCH, *axes))
    return signature, NoiseExamples(signature)


def _packed_vision(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    patch = architecture.vision.patch_size
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, patch, "packed_width"))
    sizes = TensorSpec("tgt_sizes", "int64", ("batch", 2))
    width = Axis("packed_width", patch, _LARGEST_COUNT * patch, patch)
    signature = Signature((pixels, sizes), (_features(architecture),), (BATCH, width))
    return signature, NoiseExamples(signature, width.name, patch)


def _packed_tokens(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    signature, examples = _packed_vision(architecture)
    tokens = TensorSpec("image_tokens", "float32", ("batch", "patches", architecture.vision.width))
    signature = replace(signature, outputs=(tokens,), axes=(*signature.axes, Axis("patches")))
    return signature, examples


def _packed_resampler(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    tokens = TensorSpec("image_tokens", "float32", ("batch", "patches", architecture.vision.width))
    sizes = TensorSpec("tgt_sizes", "int64", ("batch", 2))
    signature = Signature((tokens, sizes), (_features(architecture),), (BATCH, Axis("patches", 1, _LARGEST_COUNT)))
    return signature, NoiseExamples(signature)


def _video_resampler(architecture: VisionArchitecture) -> tuple[Signature, NoiseExamples]:
    tokens = TensorSpec("image_tokens", "float32", ("batch", "frames", "patches", architecture.vision.width))
    sizes = TensorSpec("tgt_sizes", "int64", ("batch", "frames", 2))
    times = TensorSpec("temporal_ids", "int64", ("batch", "frames"))
    axes = (BATCH, Axis("frames", 1, _LARGEST_GROUP), Axis("patches", 1, _LARGEST_COUNT))
    signature = Signature((tokens, sizes, times), (_features(architecture),), axes)
    return signature, NoiseExamples(signature)


class NoiseExamples:
    """Normal noise for floats; for `tgt_sizes` random grids that fit; for `temporal_ids` times, some of them -1.

    Args:
        axis: its size is the number of patches, times `step`.
    """

    def __init__(self, signature: Signature, axis: str = "patches", step: int = 1) -> None:
        self.signature, self.axis, self.step = signature, axis, step

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {spec.name: self._array(spec, sizes, rng) for spec in self.signature.inputs}

    def _array(self, spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
        shape = spec.concrete_shape(sizes)
        if spec.name == "tgt_sizes":
            return _grids(rng, shape, sizes[self.axis] // self.step)
        if spec.name == "temporal_ids":
            return rng.integers(-1, 100, shape, dtype=np.int64)
        return rng.standard_normal(shape, dtype=np.float32)


def _grids(rng: np.random.Generator, shape: tuple[int, ...], patches: int) -> Array:
    """int64 (..., 2): rows and columns of at most `patches` patches; the first image nearly fills them."""
    rows = rng.integers(1, max(int(patches**0.5), 1) + 1, shape[:-1])
    columns = np.maximum(rng.integers(1, patches + 1, shape[:-1]) // rows, 1)
    columns.flat[0] = patches // rows.flat[0]
    return np.stack([rows, columns], axis=-1).astype(np.int64)
