"""Captions and questions as salesforce/BLIP's datasets hand them to the tokenizer, in training and in evaluation.

Source: `pre_caption` and `pre_question` (data/utils.py, 3a29b74). The demos of the original do without them.
"""

from __future__ import annotations

import re

_MARKS = '.!"()*#:;~'
_SPACED = str.maketrans(dict.fromkeys(_MARKS, " "))
_REMOVED = str.maketrans(dict.fromkeys(_MARKS))
_MAX_WORDS = 50


def clean_caption(text: str) -> str:
    """Lower case, a space for each mark, one space for each run of white space, at most 50 words."""
    spaced = re.sub(r"\s{2,}", " ", text.lower().translate(_SPACED))
    return _first_words(spaced.rstrip("\n").strip(" "))


def clean_question(text: str) -> str:
    """Lower case, without the marks, at most 50 words; question marks stay."""
    return _first_words(text.lower().translate(_REMOVED).rstrip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:_MAX_WORDS])
