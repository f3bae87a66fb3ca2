"""What consumers do to images by mistake, as hypotheses: each makes the pixels that the mistake would make.

A geometry changes how an image is resized, cut and converted, a scale what is done to its levels. Resizing without
antialiasing follows torch's `interpolate(antialias=False)` and OpenCV, which place pixels by their centres, and sharp's
`affine`, with which transformers.js resizes on Node.js, which places them by their corners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, get_args

import numpy as np
from PIL import Image, ImageOps

from vlm_export.errors import InputError
from vlm_export.proof.metrics import Array
from vlm_export.runtime.inputs.images import crop_offset, preprocess_image, resized_size
from vlm_export.specs import ImageSpec
from vlm_export.specs.image import Crop, Resample, Transparency

Prepare: TypeAlias = Callable[[Image.Image, ImageSpec], Array]
# The means and deviations that libraries have as defaults: of ImageNet, of OpenAI's models, and of none.
_DEFAULTS = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)
_NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_CUBIC = {"bicubic": -0.75, "bicubic as Pillow's": -0.5}
_CROP_PERCENT = 0.875


@dataclass(frozen=True)
class Geometry:
    """A mistake before the levels are scaled; `prepare` gives float32 (3, S, S), normalised as the spec says."""

    word: str
    detail: str
    fix: str
    prepare: Prepare


@dataclass(frozen=True)
class Scale:
    """A mistake with the levels: of normalised float32 (3, S, S), whatever shape."""

    word: str
    detail: str
    fix: str
    change: Callable[[Array, ImageSpec], Array]


def consumer_specs(spec: ImageSpec) -> list[ImageSpec]:
    """What a library may make of preprocessor_config.json, which cannot say all (`layout.preprocessor_differences`)."""
    crops: tuple[Crop, ...] = ("none",) if spec.crop == "none" else ("down", "nearest_even")
    grounds: tuple[Transparency, ...] = ("white", "drop")
    return [
        replace(spec, rgb_stage="before_resize", transparency=ground, crop=crop) for ground in grounds for crop in crops
    ]


def geometries(spec: ImageSpec) -> Iterator[Geometry]:
    """The mistakes, the most usual first."""
    edge = spec.size_pixels
    antialias = f"resize with a filter that grows as the image shrinks ({spec.resample} of Pillow, antialias=True)"
    for kernel in ("bilinear", *_CUBIC):
        for centred in (True, False):
            placed = f"pixels placed by their {'centres' if centred else 'corners'}"
            yield Geometry("no antialias", f"{kernel}, {placed}", antialias, _sampled(kernel, centred))
    if spec.resample != "nearest":
        yield Geometry("no antialias", "nearest neighbour", antialias, _spec_with(resample="nearest"))
    for name in get_args(Resample):
        if name not in (spec.resample, "nearest"):
            fix = f"resize with {spec.resample}, not {name}"
            yield Geometry(f"another filter: {name}", "", fix, _spec_with(resample=name))
    square = {"resize": "shortest_edge", "resize_pixels": (edge,), "crop": "down"}
    if spec.resize != "stretch":
        fix = f"resize the shortest edge to {edge} pixels and cut the centre"
        stretched = _spec_with(resize="stretch", resize_pixels=(edge, edge), crop="none")
        yield Geometry("stretch instead of crop", "", fix, stretched)
    if spec.resize != "shortest_edge" or spec.resize_pixels != (edge,):
        yield Geometry(
            "crop instead of stretch", "", f"resize to {edge} x {edge} whatever the shape", _spec_with(**square)
        )
    fix = f"resize and cut as the bundle's preprocessor_config.json says ({spec.resize})"
    for fill in (0, 114, 127, 255):
        padded = _spec_with(resize="longest_edge", resize_pixels=(edge,), crop="down", fill=fill)
        yield Geometry("padded to a square", f"longest edge resized, filled with {fill}", fix, padded)
    larger = round(edge / _CROP_PERCENT)
    cut = _spec_with(**square | {"resize_pixels": (larger,)})
    yield Geometry("crop of a larger image", f"resized to {larger}", fix, cut)
    yield Geometry("crop without resize", "", fix, _spec_with(resize="none", resize_pixels=(), crop="down"))
    yield Geometry("crop at the corner", "", f"{fix}, from the centre", _corner)
    fix = "feed the image as it is; what training does to images at random is left out"
    yield Geometry("mirrored", "left and right exchanged", fix, _after(ImageOps.mirror))
    yield Geometry("mirrored", "top and bottom exchanged", fix, _after(ImageOps.flip))
    fix = "leave the image as the file stores it, as the original does"
    yield Geometry("EXIF orientation applied", "", fix, _after(ImageOps.exif_transpose))
    fix = "convert to RGB as the bundle's manifest says (image.transparency, image.rgb_stage)"
    for level, ground in ((0, "black"), (255, "white")):
        yield Geometry("transparency", f"put on {ground}", fix, _on_ground(level))
    for other in consumer_specs(spec):
        changes = {"rgb_stage": other.rgb_stage, "transparency": other.transparency}
        yield Geometry("conversion to RGB", f"before the resize, {other.transparency}", fix, _spec_with(**changes))
    yield Geometry("grey levels", "", "keep the colours", _after(lambda image: image.convert("L")))
    fix = "cut levels of 16 bits off at 255, as the original (Pillow) does"
    yield Geometry("16-bit levels", "scaled to 8 bits", fix, _as_eight_bits)


def scales(spec: ImageSpec) -> Iterator[Scale]:
    """The mistakes, the most usual first."""
    fix = f"subtract the mean {spec.mean} and divide by {spec.std}, of levels from 0 to 1"
    yield Scale("BGR", "channels swapped before the normalisation", "hand over R, G, B", _swapped)
    yield Scale("BGR", "channels swapped after the normalisation", "hand over R, G, B", lambda x, _: x[::-1])
    yield Scale("not normalised", "levels from 0 to 1", fix, lambda x, s: _rescaled(x, s, *_NONE))
    yield Scale("not normalised", "levels from 0 to 255", fix, lambda x, s: 255 * _rescaled(x, s, *_NONE))
    for mean, std in _DEFAULTS:
        if max(np.abs(np.subtract((mean, std), (spec.mean, spec.std))).flat) > 1e-4:
            yield Scale("mean and std", f"{mean} and {std}", fix, lambda x, s, m=mean, d=std: _rescaled(x, s, m, d))  # type: ignore[misc]
    yield Scale("mean and std", "no mean", fix, lambda x, s: _rescaled(x, s, _NONE[0], s.std))
    yield Scale("mean and std", "no std", fix, lambda x, s: _rescaled(x, s, s.mean, _NONE[1]))
    fix = "rescale levels by 1/255 once, then normalise once"
    yield Scale("mean and std", "of levels to 255", fix, lambda x, s: _normalised(255 * _rescaled(x, s, *_NONE), s))
    yield Scale("mean and std", "normalised twice", fix, _normalised)
    yield Scale("mean and std", "rescaled twice", fix, lambda x, s: _normalised(_rescaled(x, s, *_NONE) / 255, s))
    fix = "keep pixels in float32"
    yield Scale("int width", "normalised pixels cut to whole numbers", fix, lambda x, _: np.trunc(x))
    yield Scale("int width", "normalised pixels in 8 bits", fix, lambda x, _: x.astype(np.int32).astype(np.uint8))
    fix = "hand over (3, height, width)"
    yield Scale("layout", "(height, width, 3)", fix, lambda x, _: x.transpose(1, 2, 0))
    yield Scale("layout", "(height, width, 3) read as (3, height, width)", fix, _misread)
    yield Scale("layout", "(3, width, height)", fix, lambda x, _: x.transpose(0, 2, 1))


def prepared(image: Image.Image, spec: ImageSpec, prepare: Prepare) -> Array | None:
    """An image's pixels under a mistake; None where it cannot be made."""
    try:
        return prepare(image, spec)
    except (InputError, OSError, ValueError):
        return None


def _spec_with(**changes: object) -> Prepare:
    return lambda image, spec: preprocess_image(image, replace(spec, **changes))  # type: ignore[arg-type]


def _corner(image: Image.Image, spec: ImageSpec) -> Array:
    width, height = resized_size(image.size, spec.size_pixels)
    resized = image.convert("RGB").resize((width, height), Image.Resampling[spec.resample.upper()])
    return _of_square(np.asarray(resized)[: spec.size_pixels, : spec.size_pixels], spec)


def _after(change: Callable[[Image.Image], Image.Image]) -> Prepare:
    return lambda image, spec: preprocess_image(change(image), spec)


def _as_eight_bits(image: Image.Image, spec: ImageSpec) -> Array:
    if not image.mode.startswith("I"):
        return preprocess_image(image, spec)
    return preprocess_image(Image.fromarray((np.asarray(image) / 256).astype(np.uint8)), spec)


def _on_ground(level: int) -> Prepare:
    def prepare(image: Image.Image, spec: ImageSpec) -> Array:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (level, level, level, 255))
            image = Image.alpha_composite(ground, image).convert("RGB")
        return preprocess_image(image, spec)

    return prepare


def _sampled(kernel: str, centred: bool) -> Prepare:
    """Resizes by looking at the nearest pixels alone, then crops as the spec says."""

    def prepare(image: Image.Image, spec: ImageSpec) -> Array:
        edge = spec.size_pixels
        stretched = spec.resize == "stretch"
        width, height = (edge, edge) if stretched else resized_size(image.size, edge)
        levels = np.asarray(image.convert("RGB"), np.float64)
        levels = _weights(levels.shape[0], height, kernel, centred) @ levels.transpose(2, 0, 1)
        levels = levels @ _weights(levels.shape[2], width, kernel, centred).T
        left, top = (crop_offset(extent - edge, spec.crop) for extent in (width, height))
        square = levels[:, top : top + edge, left : left + edge].transpose(1, 2, 0)
        return _of_square(square.round().clip(0, 255).astype(np.uint8), spec)

    return prepare


def _weights(old: int, new: int, kernel: str, centred: bool) -> Array:
    """float64 (new, old): what each pixel of a resized line takes of the old ones."""
    offset = 0.5 if centred else 0.0
    places = (np.arange(new) + offset) * old / new - offset
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        far = np.abs(places - first - tap)
        if kernel == "bilinear":
            share = np.maximum(1 - far, 0)
        else:
            a = _CUBIC[kernel]
            near_share = ((a + 2) * far - (a + 3)) * far**2 + 1
            far_share = ((far - 5) * far + 8) * far * a - 4 * a
            share = np.where(far <= 1, near_share, np.where(far < 2, far_share, 0))
        np.add.at(weights, (np.arange(new), (first + tap).clip(0, old - 1)), share)
    return weights


def _of_square(levels: Array, spec: ImageSpec) -> Array:
    square = replace(spec, resize="none", resize_pixels=(), crop="down", rgb_stage="after_crop")
    return preprocess_image(Image.fromarray(np.ascontiguousarray(levels)), square)


def _columns(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32)[:, None, None]


def _rescaled(x: Array, spec: ImageSpec, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Levels from 0 to 1 of normalised pixels, normalised otherwise."""
    return (x * _columns(spec.std) + _columns(spec.mean) - _columns(mean)) / _columns(std)


def _normalised(x: Array, spec: ImageSpec) -> Array:
    return (x - _columns(spec.mean)) / _columns(spec.std)


def _swapped(x: Array, spec: ImageSpec) -> Array:
    return _normalised(_rescaled(x, spec, *_NONE)[::-1], spec)


def _misread(x: Array, _: ImageSpec) -> Array:
    return np.ascontiguousarray(x.transpose(1, 2, 0)).reshape(x.shape)
