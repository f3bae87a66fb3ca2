"""How inputs are prepared: torch-free specifications that a Family states and the runtime executes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm_export.errors import InputError, suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RgbStage = Literal["after_crop", "before_resize"]
Fit = Literal["crop", "squash"]
TextCleaning = Literal["openai", "none"]
TextPooling = Literal["end_token", "highest_id", "first_token"]
TextCase = Literal["lower", "kept"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class ImageSpec:
    """Image preprocessing: make the picture a square, convert to RGB, rescale, normalise.

    Attributes:
        size_pixels: edge of the square that the vision part takes.
        resample: Pillow's filter; always antialiased when shrinking.
        rgb_stage: OpenAI's pipeline converts to RGB after the crop, transformers' before the resize; palette and
            transparent pictures differ.
        mean, std: per channel (R, G, B), applied to values in [0, 1].
        fit: "crop" resizes the shorter edge and cuts a square from the centre; "squash" resizes both edges to the
            square's, whatever the aspect ratio (BLIP, nanoVLM without tiles).
    """

    size_pixels: int
    resample: Literal["bicubic", "bilinear"]
    rgb_stage: RgbStage
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "crop"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TextSpec:
    """Text preparation around `tokenizer.json`.

    Attributes:
        context_length: longest row of token ids, start and end tokens included.
        vocab_size: ids are in [0, vocab_size).
        end_token_id: id of end-of-text, kept by truncation.
        pad_token_id: fills rows of a batch on the right, up to its longest; the model does not see it.
        cleaning: "openai" repairs mojibake, unescapes HTML twice and collapses white space before tokenizing.
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
