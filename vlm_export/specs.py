"""How inputs are prepared: torch-free specifications that a Family states and the runtime executes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm_export.errors import InputError, suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RgbStage = Literal["after_crop", "before_resize", "never"]
Resize = Literal["shortest_edge", "stretch", "none"]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Crop = Literal["down", "nearest_even", "none"]
Transparency = Literal["white", "drop"]
TextCleaning = Literal["openai", "open_clip", "none"]
TextPooling = Literal["end_token", "highest_id", "first_token"]
TextCase = Literal["lower", "kept"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class ImageSpec:
    """Image preprocessing: resize, crop, convert to RGB, rescale, normalise, with Pillow.

    Attributes:
        size_pixels: edge of the square that the vision part takes.
        resample: Pillow's filter; always antialiased when shrinking, but for "nearest".
        rgb_stage: transformers converts to RGB before the resize, OpenAI's pipeline and open_clip after the crop;
            palettes and transparent images differ. "never": only images in RGB are taken.
        mean, std: per channel (R, G, B), applied to the rescaled values.
        resize: "shortest_edge" keeps the aspect ratio, "stretch" does not, "none" leaves the image as it is.
        resize_pixels: the shortest edge; or height and width of a stretched image; or nothing.
        crop: how the centre crop rounds half of an odd margin: "down" as transformers, "nearest_even" as torchvision.
            An image that is smaller than the crop is padded with zeros (black). "none": there is no crop, and an
            image that does not come out as a square of that size is refused.
        transparency: what conversion to RGB makes of transparent pixels: "white" puts the image on a white ground (as
            transformers 5), "drop" shows the colour that they hide.
        rescale_factor: each value from 0 to 255 times this.
    """

    size_pixels: int
    resample: Resample
    rgb_stage: RgbStage
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize
    resize_pixels: tuple[int, ...]
    crop: Crop
    transparency: Transparency
    rescale_factor: float = 1 / 255

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def torchvision_image_spec(
    size_pixels: int,
    resample: Resample,
    rgb_stage: RgbStage,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: Literal["shortest_edge", "stretch"] = "shortest_edge",
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


@dataclass(frozen=True)
class TextSpec:
    """Text preparation around `tokenizer.json`.

    Attributes:
        context_length: longest row of token ids, start and end tokens included.
        vocab_size: ids are in [0, vocab_size).
        end_token_id: id of end-of-text, kept by truncation.
        pad_token_id: fills rows of a batch on the right, up to its longest; the model does not see it.
        cleaning: "openai" repairs mojibake, unescapes HTML twice and collapses white space before tokenizing; so does
            "open_clip", whose texts spell special tokens in another way.
        ends_texts: the tokenizer itself ends every text with the end token, as encoders' do; chat models' do not.
        added_tokens: what the checkpoint's own code appends to its tokenizer, in order; the last ids of the vocabulary.
        pooling: whose state stands for a text: that of the first `end_token_id`, of the highest id, or of the first
            token.
        case: whether letters become lower case before they are tokenized.
        truncation_side: where a text that is too long is cut; the special tokens around it stay.
    """

    context_length: int
    vocab_size: int
    end_token_id: int
    pad_token_id: int
    cleaning: TextCleaning
    ends_texts: bool = True
    added_tokens: tuple[str, ...] = ()
    pooling: TextPooling = "end_token"
    case: TextCase = "lower"
    truncation_side: Side = "right"

    def to_json(self) -> dict[str, Any]:
        """As JSON data, without the fields that only say what was so before they existed."""
        data = {**asdict(self), "added_tokens": list(self.added_tokens)}
        defaults = {"ends_texts": True, "added_tokens": [], "pooling": "end_token", "truncation_side": "right"}
        return {key: value for key, value in data.items() if key not in defaults or value != defaults[key]}


@dataclass(frozen=True)
class Origins:
    """Where the values of the preparation of inputs come from, for people and for the manifest.

    Attributes:
        values: field of a spec ("image.mean", "text.pad_token_id") → what states it: a file and the field in it
            ("processor_config.json: image_processor.image_mean"), or whose default it is ("default of
            CLIPImageProcessor").
        ignored_files: name of a file that was found → why nothing was read from it.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    ignored_files: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Origins) -> Origins:
        """The origins of both; what `other` says counts where both say something."""
        return Origins({**self.values, **other.values}, {**self.ignored_files, **other.ignored_files})

    def to_json(self) -> dict[str, Any]:
        return {"values": dict(self.values), "ignored_files": dict(self.ignored_files)}


Record = TypeVar("Record", bound="DataclassInstance")


def record_from_json(kind: type[Record], data: Mapping[str, Any]) -> Record:
    """The frozen dataclass with those fields, lists made tuples; those with a default may be left out.

    Raises:
        InputError: unknown or missing fields.
    """
    known = [entry.name for entry in fields(kind)]
    for key in data:
        if key not in known:
            raise InputError(f"{kind.__name__} has no field {key!r}", fix=suggestion(key, known))
    required = [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise InputError(f"{kind.__name__} lacks fields", expected=", ".join(required), got=f"no {', '.join(missing)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return kind(**values)
