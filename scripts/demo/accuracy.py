"""The demo's task metric: zero-shot accuracy on held-out compositions, for any pair of encoders. Torch-free.

Each held-out composition is rendered a few times. An image is classified among the canonical captions of all 1,920
compositions, so the candidates hold every caption that differs from the truth in one attribute alone; it counts when
the nearest caption is its own, all five attributes right. Chance is 0.05 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.sentences import caption, short_caption
from demo.world import ATTRIBUTES, COLOURS, COMPOSITIONS, HELD_OUT, IMAGE_PIXELS, SHAPES, Composition, Drawing, draw

Embeddings = npt.NDArray[Any]
EncodeImage = Callable[[Sequence[Image.Image]], Embeddings]
EncodeText = Callable[[Sequence[str]], Embeddings]
# Apart from every seed that training draws: those are single integers.
_EVALUATION_SEED = 7919


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def held_out_drawings(each: int, size_pixels: int = IMAGE_PIXELS) -> list[Drawing]:
    """`each` images of every held-out composition; the same ones on every machine."""
    return [
        draw(composition, (_EVALUATION_SEED, i, k), size_pixels)
        for i, composition in enumerate(HELD_OUT)
        for k in range(each)
    ]


def evaluate(encode_image: EncodeImage, encode_text: EncodeText, each: int = 4) -> Accuracy:
    """The metric; the encoders take images or sentences and return (N, D), normalised or not."""
    drawings = held_out_drawings(each)
    images = _unit(encode_image([drawing.image for drawing in drawings]))
    truths = [drawing.composition for drawing in drawings]
    nearest = _nearest(images, encode_text([caption(composition) for composition in COMPOSITIONS]))
    guesses = [COMPOSITIONS[i] for i in nearest]
    return Accuracy(
        images=len(drawings),
        candidates=len(COMPOSITIONS),
        top1=_share([guess == truth for guess, truth in zip(guesses, truths, strict=True)]),
        by_attribute={
            name: _share([guess.value(name) == truth.value(name) for guess, truth in zip(guesses, truths, strict=True)])
            for name in ATTRIBUTES
        },
        colour_and_shape=_colour_and_shape(images, truths, encode_text),
    )


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
