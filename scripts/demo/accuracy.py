"""The demos' metrics on held-out images: zero-shot accuracy of embeddings, and exactness of texts. Torch-free.

Zero-shot: each image is classified among the canonical captions of all 1,920 compositions, so the candidates hold every
caption that differs from the truth in one attribute alone; it counts when the nearest caption is its own, all five
attributes right. Chance is 0.05 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.questions import KINDS, PROMPT, Question, ask, ask_unambiguously, caption_question
from demo.sentences import caption, short_caption
from demo.world import ATTRIBUTES, COLOURS, COMPOSITIONS, HELD_OUT, IMAGE_PIXELS, SHAPES, Composition, Drawing, draw

Embeddings = npt.NDArray[Any]
EncodeImage = Callable[[Sequence[Image.Image]], Embeddings]
EncodeText = Callable[[Sequence[str]], Embeddings]
Asked = list[tuple[Drawing, Question]]
# Apart from every seed that training draws: those are single integers.
_EVALUATION_SEED, _QUESTION_SEED, _CHAT_SEED = 7919, 7927, 7933
BATCH = 64


@dataclass(frozen=True)
class Measured:
    """What a measurement says to people and to the report, and whether the demo is good enough."""

    lines: list[str]
    figures: dict[str, Any]
    passed: bool


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1].

    Attributes:
        images: how many held-out images were classified.
        candidates: how many captions each was classified among.
        top1: the nearest caption is the image's own.
        by_attribute: the nearest caption has the image's value of that attribute.
        colour_and_shape: the nearest of the 48 short captions in the image's number ("a red circle" for one object,
            "red circles" for several) names its colour and shape.
    """

    images: int
    candidates: int
    top1: float
    by_attribute: dict[str, float]
    colour_and_shape: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"held-out images {self.images}, candidate captions {self.candidates:,}",
            f"all five attributes right  {self.top1:.2%}",
            *(f"  {name:<25}{share:.2%}" for name, share in self.by_attribute.items()),
            f"colour and shape alone     {self.colour_and_shape:.2%}",
        ]


@dataclass(frozen=True)
class Exactness:
    """Shares in [0, 1] of texts that equal the truth, all of them and by kind."""

    texts: int
    exact: float
    by_kind: dict[str, float]


def exactness_figures(found: dict[str, Exactness]) -> dict[str, Any]:
    """For the report: how the texts were searched → shares."""
    return {"exact_match": {search: asdict(each) for search, each in found.items()}}


def exactness_lines(found: dict[str, Exactness]) -> list[str]:
    """For people."""
    return [
        line
        for search, each in found.items()
        for line in (
            f"  {search:<10}{each.exact:.2%} of {each.texts:,} held-out texts are exactly right",
            *(f"    {kind:<10}{share:.2%}" for kind, share in each.by_kind.items()),
        )
    ]


def held_out_drawings(each: int, size_pixels: int = IMAGE_PIXELS) -> list[Drawing]:
    """`each` images of every held-out composition; the same ones on every machine."""
    return [
        draw(composition, (_EVALUATION_SEED, i, k), size_pixels)
        for i, composition in enumerate(HELD_OUT)
        for k in range(each)
    ]


def held_out_images(count: int) -> list[Drawing]:
    """Spread over the held-out compositions; the same ones on every machine."""
    drawings = held_out_drawings(-(-count // len(HELD_OUT)))
    return [drawings[i * len(drawings) // count] for i in range(count)]


def held_out_questions(drawings: Sequence[Drawing]) -> Asked:
    """A question of each kind about every image; the same ones on every machine."""
    rng = np.random.default_rng(_QUESTION_SEED)
    return [(drawing, ask(drawing.composition, kind, rng)) for drawing in drawings for kind in KINDS]


def held_out_chat(drawings: Sequence[Drawing]) -> Asked:
    """The caption's question and one of each kind about every image, where no text has two answers."""
    rng = np.random.default_rng(_CHAT_SEED)
    asked: Asked = []
    for drawing in drawings:
        asked.append((drawing, caption_question(drawing.composition)))
        asked += [(drawing, ask_unambiguously(drawing.composition, kind, rng)) for kind in KINDS]
    return asked


def evaluate(encode_image: EncodeImage, encode_text: EncodeText, drawings: Sequence[Drawing]) -> Accuracy:
    """The zero-shot metric; the encoders take images or sentences and return (N, D), normalised or not."""
    images = _unit(encode_image([drawing.image for drawing in drawings]))
    truths = [drawing.composition for drawing in drawings]
    nearest = _nearest(images, encode_text([caption(composition) for composition in COMPOSITIONS]))
    pairs = [(COMPOSITIONS[i], truth) for i, truth in zip(nearest, truths, strict=True)]
    return Accuracy(
        images=len(drawings),
        candidates=len(COMPOSITIONS),
        top1=_share([guess == truth for guess, truth in pairs]),
        by_attribute={
            name: _share([guess.value(name) == truth.value(name) for guess, truth in pairs]) for name in ATTRIBUTES
        },
        colour_and_shape=_colour_and_shape(images, truths, encode_text),
    )


def caption_exactness(
    write: Callable[[Sequence[Image.Image]], Sequence[str]], drawings: Sequence[Drawing]
) -> Exactness:
    """Of the images' canonical captions, without their opening."""
    truths = [caption(drawing.composition).removeprefix(PROMPT) for drawing in drawings]
    return _exactness(write([drawing.image for drawing in drawings]), truths, ["caption"] * len(truths))


def answer_exactness(
    answer: Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]], asked: Asked
) -> Exactness:
    """Of the answers to questions."""
    said = answer([drawing.image for drawing, _ in asked], [question.text for _, question in asked])
    return _exactness(said, [question.answer for _, question in asked], [question.kind for _, question in asked])


def _exactness(said: Sequence[str], truths: Sequence[str], kinds: Sequence[str]) -> Exactness:
    right = np.array([text == truth for text, truth in zip(said, truths, strict=True)])
    of_kind = {kind: right[[other == kind for other in kinds]] for kind in dict.fromkeys(kinds)}
    return Exactness(len(right), float(right.mean()), {kind: float(rows.mean()) for kind, rows in of_kind.items()})


def _colour_and_shape(images: Embeddings, truths: Sequence[Composition], encode_text: EncodeText) -> float:
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    nearest = {
        one: _nearest(images, encode_text([short_caption(colour, shape, one) for colour, shape in kinds]))
        for one in (True, False)
    }
    return _share(
        [kinds[nearest[truth.count == "one"][i]] == (truth.colour, truth.shape) for i, truth in enumerate(truths)]
    )


def _nearest(images: Embeddings, texts: Embeddings) -> list[int]:
    return [int(i) for i in (images @ _unit(texts).T).argmax(axis=1)]


def _unit(embeddings: Embeddings) -> Embeddings:
    unit: Embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return unit


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
