"""How MiniCPM-V and OmniLMM cut a picture into slices, and which text stands around their features.

Sources: the published image processors and `chat`
functions of MiniCPM-V 1.0, 2.0, Llama3-V 2.5, 2.6 (with 4.0 and 4.5, which share 2.6's), and OpenBMB/OmniLMM 08ae772.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

from vlm_export.errors import InputError, suggestion
from vlm_export.specs.codec import Spec, above, between

SliceVersion = Literal["1.0", "2.0", "2.5", "2.6", "4.0", "4.5", "omnilmm"]
SliceMode = Literal["square", "adaptive"]
PixelLayout = Literal["image", "patches"]
Pair: TypeAlias = tuple[str, str]

MAX_SIZE_PIXELS = 8192
MAX_SLICES = 256
MAX_QUERIES = 65536
MAX_NORMALISER = 1e6
Mean: TypeAlias = Annotated[float, between(-MAX_NORMALISER, MAX_NORMALISER)]
Std: TypeAlias = Annotated[float, above(0), between(0, MAX_NORMALISER)]


@dataclass(frozen=True)
class PlaceholderSpec(Spec):
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

    queries: Annotated[int, between(1, MAX_QUERIES)]
    query_token: str
    source: Pair
    slice: Pair
    grid: Pair
    row_separator: str
    image_id: Pair | None
    end: str


@dataclass(frozen=True)
class SliceSpec(Spec):
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
    size_pixels: Annotated[int, between(1, MAX_SIZE_PIXELS)]
    patch_size: Annotated[int, between(1, MAX_SIZE_PIXELS)]
    max_slices: Annotated[int, between(1, MAX_SLICES)]
    pixel_layout: PixelLayout
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Std, Std, Std]
    placeholder: PlaceholderSpec

    def check(self) -> None:
        if self.patch_size > self.size_pixels:
            raise self.refusal("patch_size", f"an integer from 1 to {self.size_pixels}")
        if self.mode == "square" and self.max_slices != 1:
            raise self.refusal("max_slices", "1, as of 'square'")
        if self.mode == "square" and self.pixel_layout != "image":
            raise self.refusal("pixel_layout", "'image', as of 'square'")


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


_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
