"""Captions and questions come out as the original's datasets make them."""

from __future__ import annotations

import pytest

from vlm_export.runtime.inputs.text_cleaning import clean_caption, clean_question

# Expected texts were written down by hand from the rules of pre_caption and pre_question.
CASES = [
    ("A Cat.", "a cat", "a cat"),
    ("what color is the cat?", "what color is the cat?", "what color is the cat?"),
    ('a "red" (big) dog; or: #1*', "a red big dog or 1", "a red big dog or 1"),
    ("well...done!", "well done", "welldone"),
    ("two, three", "two, three", "two, three"),
    ("a  b\t\tc", "a b c", "a  b\t\tc"),
    ("a\tb\n", "a\tb", "a\tb\n"),
    ("  padded  ", "padded", "  padded"),
    ("[SEP]", "[sep]", "[sep]"),
    ("~.!", "", ""),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "caption", "question"), CASES)
def test_texts_are_cleaned(text: str, caption: str, question: str) -> None:
    assert clean_caption(text) == caption
    assert clean_question(text) == question


def test_fifty_words_stay() -> None:
    words = [f"w{i}" for i in range(60)]
    assert clean_caption(" ".join(words)).split() == words[:50]
    assert clean_question(" ".join(words)).split() == words[:50]
    # Spaces in a row separate empty words, which count in a question.
    assert clean_question("  ".join(words)).split() == words[:25]
