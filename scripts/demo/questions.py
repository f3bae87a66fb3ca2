"""Questions about the demo's images, each with the one answer that counts as right. Torch-free.

Yes and no are equally frequent, and what is asked for in vain differs from the image in one attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from demo.sentences import caption
from demo.world import ATTRIBUTES, COMPOSITIONS, Composition
from vlm_export.runtime.tasks.chat import CAPTION_QUESTION

PROMPT = "a picture of "
CAPTION = "caption"
# A tokenizer that knows no capitals reads these as the question for a caption, or its plural.
_CAPTION_QUESTIONS = ("what is this", "what are these")
YES, NO, ZERO = "yes", "no", "zero"
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
_KINDS_OF_THINGS = ("object", "shape", "thing")
_PICTURES = ("picture", "picture", "image", "photo")
# {be}, {do}, {it}, {this} agree with the image's count; {color} is spelled both ways; {the} names what is there;
# {things} are what is counted, {a} and {any} what is looked for, {true_or_false} is said of what is there.
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "what": (
        "what is in the {picture}",
        "what {be} {this}",
        "what do you see",
        "what does the {picture} show",
        "what is shown",
    ),
    "shape": ("what shape {be} {it}", "which shape {be} {it}", "what shape {do} {the_thing} have"),
    "colour": (
        "what {color} {be} {the}",
        "what {color} {be} {it}",
        "which {color} {be} {the}",
        "what is the {color} of {the}",
    ),
    "count": ("how many {things} are there", "how many {things} do you see", "how many {things} are in the {picture}"),
    "size": (
        "how big {be} {the}",
        "how large {be} {it}",
        "what size {be} {the}",
        "{be} {the} large or small",
        "{be} {the} small or large",
    ),
    "position": ("where {be} {the}", "where {be} {it}", "where in the {picture} {be} {the}"),
    "exists": (
        "is there {a}",
        "is there {a} in the {picture}",
        "are there {any}",
        "do you see {a}",
        "is there anything {colour}",
        "{be} {the} {true_or_false}",
        "{be} {it} {true_or_false}",
    ),
}
KINDS = tuple(_TEMPLATES)


@dataclass(frozen=True)
class Question:
    """One of `KINDS`, the question with or without its mark, and its answer."""

    kind: str
    text: str
    answer: str


def phrase(composition: Composition) -> str:
    """The canonical caption without its opening and its place."""
    return caption(composition).removeprefix(PROMPT).removesuffix(f" {PLACES[composition.position]}")


def ask(composition: Composition, kind: str, rng: np.random.Generator) -> Question:
    """A question of that kind about an image of the composition, worded at random."""
    template = _choice(_TEMPLATES[kind], rng)
    words = _common_words(composition, rng)
    answer = {
        "what": phrase(composition),
        "shape": composition.shape,
        "colour": composition.colour,
        "size": composition.size,
        "position": PLACES[composition.position],
    }.get(kind, YES)
    if kind == "count":
        words["things"], answer = _counted(composition, rng)
    if kind == "exists":
        wanted = bool(rng.random() < 0.5)
        words |= _looked_for(composition, wanted, rng)
        answer = YES if wanted else NO
    mark = "?" if rng.random() < 0.8 else ""
    return Question(kind, template.format_map(words) + mark, answer)


def caption_question(composition: Composition) -> Question:
    """What `caption` of the runtime asks a chat model, answered by the canonical caption without its opening."""
    return Question(CAPTION, CAPTION_QUESTION, caption(composition).removeprefix(PROMPT))


def ask_unambiguously(composition: Composition, kind: str, rng: np.random.Generator) -> Question:
    """As `ask`, but no text is the caption's question too, so that none has two answers."""
    question = ask(composition, kind, rng)
    while question.text.rstrip("?") in _CAPTION_QUESTIONS:
        question = ask(composition, kind, rng)
    return question


def every_word() -> list[str]:
    """All words of captions, questions and answers, sorted."""
    return sorted({word for text in _every_text() for word in text.replace("?", " ?").split()})


def _every_text() -> Iterator[str]:
    rng = np.random.default_rng(0)
    yield ZERO
    for composition in COMPOSITIONS[::7]:
        yield caption(composition)
        for kind in KINDS:
            for _ in range(4):
                question = ask(composition, kind, rng)
                yield f"{question.text} {question.answer}"


def _common_words(composition: Composition, rng: np.random.Generator) -> dict[str, str]:
    one = composition.count == "one"
    thing = _number(_choice(_KINDS_OF_THINGS, rng), one)
    noun = _number(composition.shape, one) if rng.random() < 0.75 else thing
    adjective = f"{composition.colour} " if rng.random() < 0.2 else ""
    return {
        "be": "is" if one else "are",
        "do": "does" if one else "do",
        "it": "it" if one else "they",
        "this": "this" if one else "these",
        "picture": _choice(_PICTURES, rng),
        "color": _choice(("color", "colour"), rng),
        "the": f"the {noun}",
        "the_thing": f"the {adjective}{thing}",
    }


def _counted(composition: Composition, rng: np.random.Generator) -> tuple[str, str]:
    """What is counted, and how many there are: one time in five none."""
    there = bool(rng.random() < 0.8)
    shown = composition if there else _changed(composition, ("shape", "colour"), rng)
    generic = there and rng.random() < 0.2
    noun = _number(_choice(_KINDS_OF_THINGS, rng) if generic else shown.shape, one=False)
    coloured = shown.colour != composition.colour or rng.random() < 0.4
    return f"{shown.colour} {noun}" if coloured else noun, composition.count if there else ZERO


def _looked_for(composition: Composition, wanted: bool, rng: np.random.Generator) -> dict[str, str]:
    """Fillings of the yes-or-no templates that make them true, or false by one attribute."""
    seen = composition if wanted else _changed(composition, ("shape", "colour"), rng)
    coloured = seen.colour != composition.colour or rng.random() < 0.6
    said = f"{seen.colour} {seen.shape}" if coloured else seen.shape
    colour = seen.colour if wanted else _changed(composition, ("colour",), rng).colour
    attribute = _choice(("colour", "size", "position"), rng)
    claimed = composition if wanted else _changed(composition, (attribute,), rng)
    claim = PLACES[claimed.position] if attribute == "position" else claimed.value(attribute)
    return {
        "a": _with_article(said),
        "any": _choice(("", "any "), rng) + _number(said, one=False),
        "colour": colour,
        "true_or_false": claim,
    }


def _changed(composition: Composition, attributes: Sequence[str], rng: np.random.Generator) -> Composition:
    """The composition with another value of one of the attributes."""
    name = _choice(attributes, rng)
    others = [value for value in ATTRIBUTES[name] if value != composition.value(name)]
    return composition.with_value(name, _choice(others, rng))


def _choice(values: Sequence[str], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _number(noun: str, one: bool) -> str:
    return noun if one else noun + ("es" if noun.endswith("cross") else "s")
