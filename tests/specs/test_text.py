"""TextSpec and Origins travel through JSON, and odd ones are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_export.errors import InputError
from vlm_export.specs import Origins, TextSpec

TEXT = TextSpec(77, 49408, 49407, 0, "openai", added_tokens=("<a>",), padding="context")


def test_text_specs_survive_json() -> None:
    assert TextSpec.from_json(TEXT.to_json(), "test") == TEXT


def test_a_config_states_the_first_five_fields() -> None:
    names = ("context_length", "vocab_size", "end_token_id", "pad_token_id", "cleaning")
    spec = TextSpec.from_config({name: value for name, value in TEXT.to_json().items() if name in names})
    assert (spec.adds_eos, spec.added_tokens, spec.pooling) == (True, (), "end_token")
    assert (spec.case, spec.truncation_side, spec.padding) == ("lower", "right", "longest")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_length", 0),
        ("context_length", (1 << 20) + 1),
        ("context_length", True),
        ("vocab_size", 0),
        ("vocab_size", 1 << 31),
        ("end_token_id", 49408),
        ("end_token_id", -1),
        ("pad_token_id", 49408),
        ("pad_token_id", None),
        ("cleaning", "clip"),
        ("adds_eos", 1),
        ("added_tokens", "abc"),
        ("added_tokens", [1]),
        ("pooling", "middle"),
        ("case", "upper"),
        ("truncation_side", "both"),
        ("padding", "none"),
    ],
)
def test_odd_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"'{field}'"):
        TextSpec.from_json({**TEXT.to_json(), field: value}, "manifest")


def test_ids_are_below_the_vocabulary() -> None:
    with pytest.raises(InputError, match="'end_token_id'") as caught:
        TextSpec(77, 100, 100, 0, "none")
    assert caught.value.expected == "an integer from 0 to 99"


def test_origins_survive_json_and_the_later_one_counts() -> None:
    first, second = Origins({"image.mean": "a", "image.std": "a"}, {"x": "odd"}), Origins({"image.std": "b"})
    assert Origins.from_json(first.to_json(), "test") == first
    assert (first | second) == Origins({"image.mean": "a", "image.std": "b"}, {"x": "odd"})
    with pytest.raises(InputError, match="'values'"):
        Origins.from_json({"values": {"image.mean": 1}, "ignored_files": {}}, "test")
