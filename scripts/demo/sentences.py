"""The demo's sentences: many ways to say what a scene shows, in full or in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from demo.world import ATTRIBUTES, Composition

_COUNT_WORDS = {
    "one": ("a", "a", "one", "a single"),
    "two": ("two", "two", "2", "a pair of"),
    "three": ("three", "three", "3"),
    "four": ("four", "four", "4"),
}
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
_POSITION_WORDS = {
    "left": ("on the left", "on the left side", "at the left", "to the left"),
    "right": ("on the right", "on the right side", "at the right", "to the right"),
    "top": ("at the top", "on top", "in the upper part", "near the top"),
    "bottom": ("at the bottom", "below", "in the lower part", "near the bottom"),
    "middle": ("in the middle", "in the center", "in the centre", "at the center"),
}
_OPENINGS = ("", "", "", "a picture of ", "a photo of ", "an image of ", "a drawing of ", "this picture shows ")
_ANY_SHAPE = ("shape", "thing", "object")
_FULL_SHARE = 0.6
_OMIT_SHARE = 0.4


@dataclass(frozen=True)
class Sentence:
    """A text and what it says: the attributes' values that it is true of, one bit for each value."""

    text: str
    allowed_bits: int


def _bits() -> dict[tuple[str, str], int]:
    values = [(attribute, value) for attribute, values in ATTRIBUTES.items() for value in values]
    return {value: 1 << i for i, value in enumerate(values)}


_BIT = _bits()
_ALL_OF = {attribute: sum(_BIT[attribute, value] for value in values) for attribute, values in ATTRIBUTES.items()}


def composition_bits(composition: Composition) -> int:
    """One bit for each of the five values."""
    return sum(_BIT[attribute, composition.value(attribute)] for attribute in ATTRIBUTES)


def caption(composition: Composition) -> str:
    """The canonical sentence, which names all five attributes."""
    return _compose("a picture of ", composition, dict.fromkeys(ATTRIBUTES, 0), in_front=False)


def short_caption(colour: str, shape: str, one: bool) -> str:
    """What a user would type first: colour and shape alone, of one object or of several."""
    return f"{_article('a', colour)} {colour} {shape}" if one else f"{colour} {_plural(shape)}"


def sentence(composition: Composition, rng: np.random.Generator) -> Sentence:
    """A true sentence about the composition: all five attributes, or a random part of them."""
    names = list(ATTRIBUTES)
    full = rng.random() < _FULL_SHARE
    said = names if full else [name for name in names if rng.random() >= _OMIT_SHARE] or ["shape"]
    words = {name: int(rng.integers(0, 1 << 16)) for name in said}
    opening = _OPENINGS[int(rng.integers(0, len(_OPENINGS)))]
    text = _compose(opening, composition, words, in_front=opening == "" and rng.random() < 0.15)
    allowed = sum(_BIT[name, composition.value(name)] if name in said else _ALL_OF[name] for name in names)
    if "count" not in said:
        # The noun's number still tells one from many.
        one = _BIT["count", "one"]
        allowed = allowed - _ALL_OF["count"] + (one if composition.count == "one" else _ALL_OF["count"] - one)
    return Sentence(text, allowed)


def agreement(sentences: Sequence[Sentence], compositions: Sequence[Composition]) -> npt.NDArray[np.bool_]:
    """bool (images, sentences): whether the sentence is true of the image."""
    scenes = np.array([composition_bits(composition) for composition in compositions], dtype=np.int64)
    allowed = np.array([entry.allowed_bits for entry in sentences], dtype=np.int64)
    true: npt.NDArray[np.bool_] = (scenes[:, None] & ~allowed[None, :]) == 0
    return true


def _compose(opening: str, composition: Composition, words: dict[str, int], in_front: bool) -> str:
    """`words` holds, for each attribute that is said, which of its words to use (modulo their number)."""
    count = _word(_COUNT_WORDS[composition.count], words.get("count"))
    if not count and composition.count == "one":
        count = "a" if opening else ""
    size = _word(_SIZE_WORDS[composition.size], words.get("size"))
    colour = composition.colour if "colour" in words else ""
    noun = composition.shape if "shape" in words else _ANY_SHAPE[sum(words.values()) % len(_ANY_SHAPE)]
    place = _word(_POSITION_WORDS[composition.position], words.get("position"))
    group = " ".join(word for word in (_article(count, size or colour or noun), size, colour) if word)
    phrase = f"{group} {noun if composition.count == 'one' else _plural(noun)}".strip()
    if in_front and place:
        return f"{place} {phrase}"
    return f"{opening}{phrase} {place}".strip()


def _word(choices: Sequence[str], index: int | None) -> str:
    return "" if index is None else choices[index % len(choices)]


def _article(count: str, following: str) -> str:
    return "an" if count == "a" and following[0] in "aeiou" else count


def _plural(noun: str) -> str:
    return noun + "es" if noun == "cross" else noun + "s"
