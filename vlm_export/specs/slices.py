"""How an image is cut into slices, and which text stands around their features in a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from vlm_export.specs.codec import Spec, between
from vlm_export.specs.image import Mean, Positive

SliceMode = Literal["square", "adaptive"]
PixelLayout = Literal["image", "patches"]
Pair: TypeAlias = tuple[str, str]

MAX_SIZE_PIXELS = 8192
MAX_SLICES = 256
MAX_QUERIES = 65536


@dataclass(frozen=True)
class PlaceholderSpec(Spec):
    """The text that stands for an image in a prompt; pairs are (before, after).

    Attributes:
        queries: features of one slice, each in the place of one `query_token`.
        query_token: fills the places; its id never reaches the language model.
        source: around the features of the whole image.
        slice: around those of one slice of the grid.
        grid: around all slices, if there are any.
        row_separator: between the grid's rows.
        image_id: around the image's number in the prompt, from 0; None where images are not numbered.
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
    """From an image to the inputs of the vision part: always RGB first, Pillow's bicubic, values in [0, 1].

    Attributes:
        mode: "square" resizes to one square, whatever the aspect; "adaptive" keeps the aspect and cuts large images
            into a grid, of which each slice is seen beside the whole image.
        size_pixels: the square's edge; adaptive: the edge of the square that has a slice's area (`scale_resolution`).
        patch_size: adaptive sides are its multiples.
        max_slices: most slices of a grid, the whole image not counted; 1 never cuts.
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
    std: tuple[Positive, Positive, Positive]
    placeholder: PlaceholderSpec

    def check(self) -> None:
        if self.patch_size > self.size_pixels:
            raise self.refusal("patch_size", f"an integer from 1 to {self.size_pixels}")
        if self.mode == "square" and self.max_slices != 1:
            raise self.refusal("max_slices", "1, as of 'square'")
        if self.mode == "square" and self.pixel_layout != "image":
            raise self.refusal("pixel_layout", "'image', as of 'square'")
