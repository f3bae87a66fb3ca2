"""What a manifest says about captions, answers and matches: read strictly into frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from vlm_export.bundle.strict_json import Fields

FirstToken: TypeAlias = Literal["cls", "enc"]
FIRST_TOKENS: tuple[FirstToken, ...] = get_args(FirstToken)

_MAX_TOKENS = 1_000_000
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that the runtime writes itself.

    Attributes:
        cls: starts a text; sep: ends one; pad: fills a batch.
        decoder_start: starts what is decoded ([DEC]).
        encoder_start: starts a text that attends to a picture ([ENC]).
    """

    cls: int
    sep: int
    pad: int
    decoder_start: int
    encoder_start: int

    def first(self, convention: FirstToken) -> int:
        """The id that starts a text under that convention."""
        return self.encoder_start if convention == "enc" else self.cls


@dataclass(frozen=True)
class CaptionSettings:
    """Defaults of captions; lengths count the prompt's tokens."""

    prompt: str
    beams: int
    max_length: int
    min_length: int


@dataclass(frozen=True)
class AnswerSettings:
    """Defaults of answers.

    Attributes:
        question_first_token: what the question starts with.
        label_smoothing: of the loss that ranks candidates, at least 0 and below 1.
        attend_padding: whether the decoder attends to the padding of shorter questions, as the original does.
    """

    question_first_token: FirstToken
    max_question_tokens: int
    beams: int
    max_length: int
    min_length: int
    label_smoothing: float
    attend_padding: bool


@dataclass(frozen=True)
class MatchSettings:
    """Defaults of matches: what the text starts with, and its greatest length."""

    first_token: FirstToken
    max_text_tokens: int


@dataclass(frozen=True)
class LanguageSettings:
    """What the model can be asked; None for what its checkpoint was not trained for."""

    tokens: SpecialTokens
    caption: CaptionSettings | None
    answer: AnswerSettings | None
    match: MatchSettings | None


def settings_from_facts(facts: Mapping[str, Any], vocab_size: int, where: str) -> LanguageSettings:
    """The settings in a manifest's facts; other facts are left aside.

    Args:
        vocab_size: token ids are below it.
        where: what errors call the manifest.

    Raises:
        InputError: a field is missing, unknown, of another type or out of its range.
    """
    top = Fields({"tokens": None, **facts}, f"{where}: facts")

    def optional(key: str, read: Callable[[Fields], Settings]) -> Settings | None:
        return read(top.fields(key)) if key in facts else None

    return LanguageSettings(
        tokens=_tokens(top.fields("tokens"), vocab_size),
        caption=optional("caption", _caption),
        answer=optional("answer", _answer),
        match=optional("match", _match),
    )


def _tokens(fields: Fields, vocab_size: int) -> SpecialTokens:
    names = _checked_names(fields, SpecialTokens)
    return SpecialTokens(**{name: fields.integer(name, maximum=vocab_size - 1) for name in names})


def _caption(fields: Fields) -> CaptionSettings:
    _checked_names(fields, CaptionSettings)
    return CaptionSettings(fields.text("prompt"), *_lengths(fields))


def _answer(fields: Fields) -> AnswerSettings:
    _checked_names(fields, AnswerSettings)
    return AnswerSettings(
        _first_token(fields, "question_first_token"),
        fields.integer("max_question_tokens", 2, _MAX_TOKENS),
        *_lengths(fields),
        label_smoothing=_share(fields, "label_smoothing"),
        attend_padding=fields.boolean("attend_padding"),
    )


def _match(fields: Fields) -> MatchSettings:
    _checked_names(fields, MatchSettings)
    return MatchSettings(_first_token(fields, "first_token"), fields.integer("max_text_tokens", 2, _MAX_TOKENS))


def _checked_names(fields: Fields, kind: type[Any]) -> tuple[str, ...]:
    names = tuple(field.name for field in dataclasses.fields(kind))
    fields.only(names)
    return names


def _lengths(fields: Fields) -> tuple[int, int, int]:
    """beams, max_length and min_length."""
    longest = fields.integer("max_length", 1, _MAX_TOKENS)
    return fields.integer("beams", 1, 1000), longest, fields.integer("min_length", 0, longest)


def _first_token(fields: Fields, key: str) -> FirstToken:
    return cast(FirstToken, fields.choice(key, FIRST_TOKENS))


def _share(fields: Fields, key: str) -> float:
    value = fields.data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise fields.fail(key, "a number, at least 0 and below 1")
    return float(value)
