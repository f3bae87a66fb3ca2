"""Pieces of streamed text: complete characters, nothing lost, white space as in the whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_export.runtime.generation.text_stream import TextStream


def decode(ids: Sequence[int]) -> str:
    """Each token is one byte, as in the worst byte-level vocabulary; 256 and above are special tokens."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def pieces_of(ids: Sequence[int]) -> list[str]:
    stream = TextStream(decode)
    return [stream.push(token, is_last=i == len(ids) - 1) for i, token in enumerate(ids)]


def test_a_character_waits_for_its_last_byte() -> None:
    assert pieces_of(list("aé🙂b".encode())) == ["a", "", "é", "", "", "", "🙂", "b"]


def test_white_space_waits_for_what_follows() -> None:
    assert pieces_of(list(b"  a b  c ")) == ["", "", "a", "", " b", "", "", "  c", ""]
    assert pieces_of(list(b"   ")) == ["", "", ""]


def test_special_tokens_have_no_text() -> None:
    assert pieces_of([300, *b" a", 300, 301, *b"b", 300]) == ["", "", "a", "", "", "b", ""]


def test_an_unfinished_character_comes_with_the_last_token() -> None:
    assert pieces_of([*b"a", 0xF0, 0x9F]) == ["a", "", "\ufffd"]


@given(st.text(max_size=30))
def test_pieces_add_up(text: str) -> None:
    assert "".join(pieces_of(list(text.encode()))) == text.strip()


@given(st.lists(st.integers(0, 260), max_size=30))
def test_pieces_of_any_bytes_add_up(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == decode(ids).strip()


@pytest.mark.parametrize("text", ["héllo wörld", "日本語 です", "👩‍👩‍👧 ok"])
def test_no_piece_ends_inside_a_character(text: str) -> None:
    for piece in pieces_of(list(text.encode())):
        assert "\ufffd" not in piece
