"""What the nanoVLM demo is asked about an image, and what it says: questions, and one that asks for a caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from demo.questions import KINDS, PROMPT, Question, ask
from demo.sentences import caption
from demo.world import Composition
from vlm_export.runtime.tasks.chat import CAPTION_QUESTION

CAPTION = "caption"
# How often a kind is asked: comparing what is said with what is seen is learnt last.
_WEIGHTS = {"exists": 4.0, "count": 2.0}
_FREQUENCIES = np.array([_WEIGHTS.get(kind, 1.0) for kind in KINDS])
# The BLIP demo's questions that are the caption's, since the tokenizer knows no capitals, or its plural.
_SAME = ("what is this", "what are these")


def caption_question(composition: Composition) -> Question:
    """What `caption` of the runtime asks, answered by the canonical caption without its opening."""
    return Question(CAPTION, CAPTION_QUESTION, caption(composition).removeprefix(PROMPT))


def question_of_kind(composition: Composition, kind: str, rng: np.random.Generator) -> Question:
    """A question of one of `KINDS`, worded at random; no text has two answers."""
    question = ask(composition, kind, rng)
    while question.text.rstrip("?") in _SAME:
        question = ask(composition, kind, rng)
    return question


def training_questions(composition: Composition, count: int, rng: np.random.Generator) -> Sequence[Question]:
    """The caption's question and `count` others."""
    kinds = rng.choice(len(KINDS), size=count, p=_FREQUENCIES / _FREQUENCIES.sum())
    return [caption_question(composition), *(question_of_kind(composition, KINDS[int(kind)], rng) for kind in kinds)]
