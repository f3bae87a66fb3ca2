"""How images become the pixels of a vision part: what a family states and the runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from vlm_export.specs.codec import Spec, between

MAX_IMAGE_SIZE_PIXELS = 8192

RgbStage = Literal["after_crop", "before_resize", "never"]
Resize = Literal["shortest_edge", "longest_edge", "stretch", "none"]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Crop = Literal["down", "nearest_even", "none"]
Transparency = Literal["white", "drop"]
Edge: TypeAlias = Annotated[int, between(1, MAX_IMAGE_SIZE_PIXELS)]
MAX_NORMALISER = 1e6
"""Of a mean, a deviation and a factor of pixels; and one over it the least of the last two. float32 holds them all."""
Mean: TypeAlias = Annotated[float, between(-MAX_NORMALISER, MAX_NORMALISER)]
Positive: TypeAlias = Annotated[float, between(1 / MAX_NORMALISER, MAX_NORMALISER)]
_RESIZE_EDGES = {"shortest_edge": 1, "longest_edge": 1, "stretch": 2, "none": 0}


@dataclass(frozen=True)
class ImageSpec(Spec):
    """Image preprocessing: resize, crop, convert to RGB, rescale, normalise, with Pillow.

    Attributes:
        size_pixels: edge of the square that the vision part takes.
        resample: Pillow's filter; always antialiased when shrinking, but for "nearest".
        rgb_stage: transformers converts to RGB before the resize, OpenAI's pipeline and open_clip after the crop;
            palettes and transparent images differ. "never": only images in RGB are taken.
        mean, std: per channel (R, G, B), applied to the rescaled values.
        resize: "shortest_edge" and "longest_edge" keep the aspect ratio, "stretch" does not, "none" leaves the image
            as it is.
        resize_pixels: the shortest or longest edge; or height and width of a stretched image; or nothing.
        crop: how the centre crop rounds half of an odd margin: "down" as transformers, "nearest_even" as torchvision.
            An image that is smaller than the crop is padded with `fill`. "none": there is no crop, and an
            image that does not come out as a square of that size is refused.
        transparency: what conversion to RGB makes of transparent pixels: "white" puts the image on a white ground (as
            transformers 5), "drop" shows the colour that they hide.
        rescale_factor: each value from 0 to 255 times this.
        fill: level of every band where a crop pads; 0 is black.

    Raises:
        InputError: a value is of another type or out of range, or the steps contradict each other.
    """

    size_pixels: Edge
    resample: Resample
    rgb_stage: RgbStage
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Positive, Positive, Positive]
    resize: Resize
    resize_pixels: tuple[Edge, ...]
    crop: Crop
    transparency: Transparency
    rescale_factor: Positive = 1 / 255
    fill: Annotated[int, between(0, 255)] = 0

    @property
    def edge_pixels(self) -> int:
        """Edge of the square that an image becomes."""
        return self.size_pixels

    def check(self) -> None:
        count = _RESIZE_EDGES[self.resize]
        if len(self.resize_pixels) != count:
            raise self.refusal("resize_pixels", f"{count} edges, as of {self.resize!r}")
        if self.crop == "none" and any(edge != self.size_pixels for edge in self.resize_pixels):
            raise self.refusal("resize_pixels", f"{self.size_pixels} where nothing is cropped")


def torchvision_image_spec(
    size_pixels: int,
    resample: Resample,
    rgb_stage: RgbStage,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: Literal["shortest_edge", "longest_edge", "stretch"] = "shortest_edge",
) -> ImageSpec:
    """The spec of `Resize`, `CenterCrop` (of a stretched image: none), `ToTensor` and `Normalize` of torchvision.

    That is the pipeline of openai/CLIP, open_clip and salesforce/BLIP.
    """
    stretched = resize == "stretch"
    return ImageSpec(
        size_pixels,
        resample,
        rgb_stage,
        mean,
        std,
        resize,
        (size_pixels, size_pixels) if stretched else (size_pixels,),
        "none" if stretched else "nearest_even",
        "drop",
    )
