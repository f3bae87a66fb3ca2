"""Facts about prompts and answers are read strictly."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
from vlm_export.runtime.chat_settings import ChatSettings, chat_settings_from_facts

from vlm_export.errors import InputError
from vlm_export.specs.tiles import TileSpec

FACTS = runpy.run_path(str(Path(__file__).with_name("chat_facts.py")))
facts_of, VOCABULARY = FACTS["facts_of"], FACTS["VOCABULARY"]


def read(facts: Any, vocab_size: int = 386) -> ChatSettings:
    return chat_settings_from_facts(facts, vocab_size, "vlm_export.json")


def test_the_layouts() -> None:
    prepended, placeholders, tiles = (read(facts_of(variant)) for variant in VOCABULARY)
    assert (prepended.layout, prepended.image_token, prepended.tiles) == ("prepended", None, None)
    assert (placeholders.layout, placeholders.image_token_id, placeholders.after) == ("placeholders", 320, " Answer:")
    assert (tiles.layout, tiles.global_image_token, tiles.before) == ("tiles", "<|global_image|>", "<|im_start|>user\n")
    assert tiles.tiles == TileSpec(32, 64, resize_to_max_side=True)
    assert tiles.eos_token_ids == (2,)
    assert (tiles.sampling.top_k, tiles.sampling.top_p, tiles.sampling.temperature) == (50, 0.9, 0.5)


def test_other_facts_are_left_aside() -> None:
    facts = facts_of("450m")
    assert read({**facts, "keep_fp32": []}) == read(facts)


def test_no_narrowing_is_null() -> None:
    facts = facts_of("222m")
    facts["chat"]["sampling"] = {"top_k": None, "top_p": None, "temperature": 1}
    assert read(facts).sampling.top_k is None
    assert read(facts).sampling.top_p is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layout", "appended"),
        ("tokens_per_tile", 0),
        ("tokens_per_tile", 513),
        ("image_token", None),
        ("image_token", 5),
        ("image_token_id", 386),
        ("image_token_id", "320"),
        ("global_image_token", 1),
        ("tile_tokens", []),
        ("context_length", 1),
        ("context_length", True),
        ("max_prompt_tokens", 0),
        ("eos_token_ids", 2),
        ("eos_token_ids", [386]),
        ("eos_token_ids", [True]),
        ("pad_token_id", -1),
        ("max_new_tokens", 0),
        ("prompt.before", None),
        ("prompt.after", 1),
        ("sampling.top_k", 0),
        ("sampling.top_p", 0),
        ("sampling.top_p", 1.5),
        ("sampling.top_p", True),
        ("sampling.temperature", 0),
        ("sampling.temperature", None),
        ("sampling.temperature", "1"),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any) -> None:
    facts = copy.deepcopy(facts_of("split"))
    group = facts["chat"]
    *outer, name = path.split(".")
    for key in outer:
        group = group[key]
    group[name] = value
    with pytest.raises(InputError) as caught:
        read(facts)
    assert name.removesuffix("_id") in caught.value.what
    assert "chat" in caught.value.where


@pytest.mark.parametrize("name", ["layout", "prompt", "sampling", "eos_token_ids"])
def test_missing_and_unknown_fields_are_refused(name: str) -> None:
    facts = facts_of("450m")
    chat = facts["chat"]
    with pytest.raises(InputError, match="missing fields"):
        read({"chat": {key: value for key, value in chat.items() if key != name}})
    with pytest.raises(InputError, match="unknown field 'voice'"):
        read({"chat": {**chat, "voice": 1}})
    with pytest.raises(InputError):
        read({})


def test_contradictions_are_refused() -> None:
    prepended, placeholders, tiles = (facts_of(variant) for variant in VOCABULARY)
    with pytest.raises(InputError, match="'image_token'"):
        read({"chat": {**prepended["chat"], "image_token": "<|image|>", "image_token_id": 320}})
    with pytest.raises(InputError, match="contradict"):
        read({"chat": tiles["chat"]})
    with pytest.raises(InputError, match="contradict"):
        read({**placeholders, "tiles": tiles["tiles"]})
    with pytest.raises(InputError, match="tile_tokens"):
        read({"chat": {**placeholders["chat"], "tile_tokens": {"r1c1": "<row_1_col_1>"}}})
    with pytest.raises(InputError, match="no token that says where") as caught:
        read({**tiles, "tiles": {"tile_size_pixels": 32, "max_side_pixels": 32 * 9, "resize_to_max_side": True}})
    assert "r1c9" in caught.value.got
    with pytest.raises(InputError, match="not usable"):
        read({**tiles, "tiles": {**tiles["tiles"], "max_side_pixels": 33}})
