"""The nanoVLM demo's metric: captions and answers that are exactly right, on held-out images. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from demo.blip_accuracy import Exactness, exactness
from demo.nanovlm_questions import caption_question, question_of_kind
from demo.questions import KINDS, Question
from demo.world import Drawing

Answer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]
_EVALUATION_SEED = 7933


def held_out_questions(drawings: Sequence[Drawing]) -> list[tuple[Drawing, Question]]:
    """The caption's question and one of each kind about every image; the same ones on every machine."""
    rng = np.random.default_rng(_EVALUATION_SEED)
    return [
        (drawing, question)
        for drawing in drawings
        for question in (
            caption_question(drawing.composition),
            *(question_of_kind(drawing.composition, kind, rng) for kind in KINDS),
        )
    ]


def answer_exactness(answer: Answer, drawings: Sequence[Drawing]) -> Exactness:
    """Of captions and answers, by kind."""
    asked = held_out_questions(drawings)
    said = answer([drawing.image for drawing, _ in asked], [question.text for _, question in asked])
    return exactness(said, [question.answer for _, question in asked], [question.kind for _, question in asked])
