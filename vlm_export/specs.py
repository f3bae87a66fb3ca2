"""How inputs are prepared: torch-free specifications that a Family states and the runtime executes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
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


Record = TypeVar("Record", bound="DataclassInstance")


def record_from_json(kind: type[Record], data: Mapping[str, Any]) -> Record:
    """The frozen dataclass with those fields, lists made tuples; those with a default may be left out.

    Raises:
        InputError: unknown or missing fields.
    """
    known = [field.name for field in fields(kind)]
    for key in data:
        if key not in known:
            raise InputError(f"{kind.__name__} has no field {key!r}", fix=suggestion(key, known))
    required = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise InputError(f"{kind.__name__} lacks fields", expected=", ".join(required), got=f"no {', '.join(missing)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return kind(**values)
