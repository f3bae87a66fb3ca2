"""What a manifest says about captions, answers and matches is read strictly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from vlm_export.runtime.language_settings import settings_from_facts

from vlm_export.errors import InputError

FACTS: dict[str, Any] = {
    "tokens": {"cls": 101, "sep": 102, "pad": 0, "decoder_start": 155, "encoder_start": 156},
    "caption": {"prompt": "a picture of ", "beams": 3, "max_length": 20, "min_length": 5},
    "answer": {
        "question_first_token": "enc",
        "max_question_tokens": 35,
        "beams": 3,
        "max_length": 10,
        "min_length": 1,
        "label_smoothing": 0.1,
        "attend_padding": True,
    },
    "match": {"first_token": "cls", "max_text_tokens": 35},
    "dropped_keys": [],
}


def read(facts: dict[str, Any]) -> Any:
    return settings_from_facts(facts, 157, "manifest")


def test_facts_become_settings() -> None:
    settings = read(FACTS)
    assert (settings.caption.prompt, settings.caption.beams, settings.caption.min_length) == ("a picture of ", 3, 5)
    assert (settings.answer.label_smoothing, settings.answer.attend_padding) == (0.1, True)
    assert settings.match.first_token == "cls"
    assert (settings.tokens.first("cls"), settings.tokens.first("enc")) == (101, 156)


def test_what_is_not_said_is_none() -> None:
    settings = read({"tokens": FACTS["tokens"]})
    assert (settings.caption, settings.answer, settings.match) == (None, None, None)


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("tokens", "decoder_start", 157),
        ("tokens", "sep", -1),
        ("tokens", "cls", True),
        ("tokens", "start", 5),
        ("caption", "prompt", None),
        ("caption", "beams", 0),
        ("caption", "min_length", 21),
        ("answer", "question_first_token", "dec"),
        ("answer", "label_smoothing", 1),
        ("answer", "label_smoothing", "0.1"),
        ("answer", "label_smoothing", True),
        ("answer", "attend_padding", 1),
        ("answer", "max_question_tokens", 1),
        ("match", "first_token", None),
        ("match", "max_text_tokens", 35.0),
    ],
)
def test_a_wrong_field_is_named(group: str, field: str, value: Any) -> None:
    facts = copy.deepcopy(FACTS)
    facts[group][field] = value
    with pytest.raises(InputError) as caught:
        read(facts)
    assert field in caught.value.what
    assert group in caught.value.where


@pytest.mark.parametrize("group", ["tokens", "caption", "answer", "match"])
def test_missing_fields_and_groups_of_another_kind_are_refused(group: str) -> None:
    others: tuple[Any, ...] = ({}, [], None)
    for value in others:
        with pytest.raises(InputError):
            read({**FACTS, group: value})
    with pytest.raises(InputError):
        read({})
