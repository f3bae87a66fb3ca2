"""How MiniCPM-V and OmniLMM cut a picture into slices, and which text stands around their features.

Torch-free facts that a Family states and a manifest carries. Sources: the published image processors and `chat`
functions of MiniCPM-V 1.0, 2.0, Llama3-V 2.5, 2.6 (with 4.0 and 4.5, which share 2.6's), and OpenBMB/OmniLMM 08ae772.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from vlm_export.errors import InputError, suggestion
from vlm_export.specs import record_from_json

SliceVersion = Literal["1.0", "2.0", "2.5", "2.6", "4.0", "4.5", "omnilmm"]
SliceMode = Literal["square", "adaptive"]
PixelLayout = Literal["image", "patches"]
Pair: TypeAlias = tuple[str, str]

MAX_SIZE_PIXELS = 8192
MAX_SLICES = 256
MAX_QUERIES = 65536
MAX_NORMALISER = 1e6


@dataclass(frozen=True)
class PlaceholderSpec:
    """The text that stands for a picture in a prompt; pairs are (before, after).

    Attributes:
        queries: features of one slice, each in the place of one `query_token`.
        query_token: fills the places; its id never reaches the language model.
        source: around the features of the whole picture.
        slice: around those of one slice of the grid.
        grid: around all slices, if there are any.
        row_separator: between the grid's rows.
        image_id: around the picture's number in the prompt, from 0; None where pictures are not numbered.
        end: after everything.
    """

    queries: int
    query_token: str
    source: Pair
    slice: Pair
    grid: Pair
    row_separator: str
    image_id: Pair | None
    end: str

    def __post_init__(self) -> None:
        _check_integer("placeholder.queries", self.queries, MAX_QUERIES)
        for name in ("query_token", "row_separator", "end"):
            _check(f"placeholder.{name}", isinstance(getattr(self, name), str), "a string", getattr(self, name))
        for name in ("source", "slice", "grid", "image_id"):
            pair = getattr(self, name)
            fine = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            _check(f"placeholder.{name}", fine or (name == "image_id" and pair is None), "two strings", pair)


@dataclass(frozen=True)
class SliceSpec:
    """From a picture to the inputs of the vision part: always RGB first, Pillow's bicubic, values in [0, 1].

    Attributes:
        mode: "square" resizes to one square, whatever the aspect; "adaptive" keeps the aspect and cuts large pictures
            into a grid, of which each slice is seen beside the whole picture.
        size_pixels: the square's edge; adaptive: the edge of the square that has a slice's area (`scale_resolution`).
        patch_size: adaptive sides are its multiples.
        max_slices: most slices of a grid, the whole picture not counted; 1 never cuts.
        pixel_layout: "image" gives (3, H, W); "patches" (3, p, p * L), the L patches of a slice row by row.
        mean, std: per channel (R, G, B).
        placeholder: the text around the features.

    Raises:
        InputError: a value is of another type or out of range.
    """

    mode: SliceMode
    size_pixels: int
    patch_size: int
    max_slices: int
    pixel_layout: PixelLayout
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    placeholder: PlaceholderSpec

    def __post_init__(self) -> None:
        _check("mode", self.mode in get_args(SliceMode), f"one of {get_args(SliceMode)}", self.mode)
        _check_integer("size_pixels", self.size_pixels, MAX_SIZE_PIXELS)
        _check_integer("patch_size", self.patch_size, self.size_pixels)
        _check_integer("max_slices", self.max_slices, MAX_SLICES if self.mode == "adaptive" else 1)
        known = get_args(PixelLayout) if self.mode == "adaptive" else ("image",)
        _check("pixel_layout", self.pixel_layout in known, f"one of {known}", self.pixel_layout)
        _check("mean", _are_numbers(self.mean), "three numbers", self.mean)
        _check(
            "std", _are_numbers(self.std) and min(self.std) >= 1 / MAX_NORMALISER, "three positive numbers", self.std
        )
        _check("placeholder", isinstance(self.placeholder, PlaceholderSpec), "a placeholder", self.placeholder)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def slice_spec_from_json(data: Mapping[str, Any]) -> SliceSpec:
    """The spec that `SliceSpec.to_json` wrote; InputError on unknown, missing or odd values."""
    placeholder = data.get("placeholder")
    if not isinstance(placeholder, Mapping):
        return record_from_json(SliceSpec, data)  # Which refuses it, and names what is missing or odd.
    return record_from_json(SliceSpec, {**data, "placeholder": record_from_json(PlaceholderSpec, placeholder)})


def slice_spec_from_version(
    version: str, *, queries: int, size_pixels: int = 448, patch_size: int = 14, max_slices: int = 9
) -> SliceSpec:
    """The published preprocessing of one version.

    Args:
        version: one of SliceVersion.
        queries: the resampler's queries (`query_num`; 96 for 2.5, otherwise 64).
        size_pixels: `image_size` of 1.0 and OmniLMM, `scale_resolution` of the others.
        max_slices: `max_slice_nums`; 1.0 and OmniLMM never cut.

    Raises:
        InputError: the version is unknown, or a value is out of range.
    """
    if version not in get_args(SliceVersion):
        raise InputError(f"no preprocessing is known for version {version!r}", fix=_known_versions(version))
    square = version in ("1.0", "omnilmm")
    mean, std = (_CLIP_MEAN, _CLIP_STD) if version == "omnilmm" else (_HALF, _HALF)
    return SliceSpec(
        mode="square" if square else "adaptive",
        size_pixels=size_pixels,
        patch_size=patch_size,
        max_slices=1 if square else max_slices,
        pixel_layout="image" if square or version == "2.0" else "patches",
        mean=mean,
        std=std,
        placeholder=_placeholder(version, queries),
    )


def _placeholder(version: str, queries: int) -> PlaceholderSpec:
    image, cut, nothing = ("<image>", "</image>"), ("<slice>", "</slice>"), ("", "")
    if version == "omnilmm":
        marks = ("<im_start>", "<im_end>")
        return PlaceholderSpec(queries, "<im_patch>", marks, marks, nothing, "\n", None, "\n")
    if version in ("1.0", "2.0", "2.5"):
        # The line break of the older versions belongs to `chat`, which puts it between the picture and the question.
        return PlaceholderSpec(queries, "<unk>", image, image, cut, "\n", None, "" if version == "2.5" else "\n")
    return PlaceholderSpec(queries, "<unk>", image, cut, nothing, "\n", ("<image_id>", "</image_id>"), "")


def _known_versions(version: str) -> str:
    return suggestion(version, get_args(SliceVersion))


def _check_integer(name: str, value: object, maximum: int) -> None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= maximum
    _check(name, fine, f"an integer from 1 to {maximum}", value)


def _are_numbers(values: object) -> bool:
    if not isinstance(values, tuple) or len(values) != 3:
        return False
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == 3 and all(-MAX_NORMALISER <= value <= MAX_NORMALISER for value in numbers)


def _check(name: str, fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise InputError("the slicing of pictures is not usable", where=name, expected=expected, got=repr(got))


_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
