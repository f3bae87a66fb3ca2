"""A bundle's tasks on images and texts, with other graphs in the place of its own, and what each part was fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from vlm_export.bundle.manifest import PRECISIONS
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError
from vlm_export.quantizing.samples import SampleSet
from vlm_export.runtime.engines.onnxruntime import Array, Engine
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.model import Model
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.answer import AnswerTask
from vlm_export.runtime.tasks.caption import CaptionTask
from vlm_export.runtime.tasks.chat import ChatTask

Feeds = Mapping[str, Array]
QUESTIONS = ("What is in this image?", "What colour is it?", "How many are there?", "Describe this image.")
"""What is asked where the user names no texts: of images, in turn."""

_MOST_WRITTEN, _MOST_OWN_WRITTEN, _LONGEST_WRITTEN = 8, 400, 24
_MOST_FEEDS, _MOST_FEED_BYTES = 96, 96 << 20


@dataclass(frozen=True)
class Answers:
    """What a bundle's tasks gave.

    Attributes:
        image_vectors, text_vectors: float32 (N, D), rows of unit length; None where they are not embedded.
        words: what was written, in order.
        accuracies: of labels, of the nearest text of an image, and of the nearest image of a text, as in `Loss`; None
            of what the samples do not tell.
        feeds: part → what it was fed, in order; of many, the first and an even choice of the others.
        not_run: what could not be asked, a sentence each.
    """

    image_vectors: FloatArray | None = None
    text_vectors: FloatArray | None = None
    words: tuple[str, ...] = ()
    accuracies: tuple[float | None, float | None, float | None] = (None, None, None)
    feeds: Mapping[str, list[Feeds]] = field(default_factory=dict)
    not_run: tuple[str, ...] = ()


class _SwappedSession(Session):
    """The bundle in float32, some of its parts by other engines; every part's feeds are kept."""

    def __init__(self, bundle: OpenBundle, start: Mapping[str, Callable[[], Engine]], threads: int | None) -> None:
        super().__init__(bundle, precision=PRECISIONS[0], threads=threads)
        self._start, self._own = dict(start), dict[str, Engine]()
        self.seen: dict[str, _Seen] = {}

    def engine(self, part: str) -> Engine:
        if part not in self._own:
            make = self._start.get(part)
            engine = super().engine(part) if make is None else make()
            self._own[part] = _Recording(engine, self.seen.setdefault(part, _Seen()))
        return self._own[part]


class _Seen:
    """A choice of what was fed: all up to a number, then of what comes later every second, every fourth, …"""

    def __init__(self) -> None:
        self.feeds: list[Feeds] = []
        self._count, self._stride, self._bytes = 0, 1, 0

    def add(self, feeds: Feeds) -> None:
        size = sum(array.nbytes for array in feeds.values())
        if self._count % self._stride == 0:
            if len(self.feeds) >= _MOST_FEEDS or (self.feeds and self._bytes + size > _MOST_FEED_BYTES):
                self.feeds = self.feeds[::2]
                self._bytes = sum(array.nbytes for one in self.feeds for array in one.values())
                self._stride *= 2
            self.feeds.append({name: np.array(array) for name, array in feeds.items()})
            self._bytes += size
        self._count += 1


class _Recording:
    """An engine that keeps what it is fed."""

    def __init__(self, engine: Engine, seen: _Seen) -> None:
        self._engine, self._seen = engine, seen
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._seen.add(feeds)
        return self._engine.run(feeds)


def run_tasks(
    bundle: OpenBundle, samples: SampleSet, start: Mapping[str, Callable[[], Engine]], threads: int | None
) -> Answers:
    """Asks the bundle all that it can do: embeddings of everything, words and matches of the user's images or a few.

    Args:
        start: part → what starts the engine that runs it; other parts run in float32.
    """
    session = _SwappedSession(bundle, start, threads)
    model, not_run = Model(session), list[str]()
    images, texts = list(samples.images), list(samples.texts)
    vectors: dict[str, FloatArray] = {}
    unreadable: list[int] = []
    with _noted("embed", not_run):
        if "embed" in model.tasks and images and model.embedding.spec.image is not None:
            vectors["images"] = model.encode_image(
                images, batch_size=4, unreadable=lambda number, error: unreadable.append(number)
            )
    with _noted("embed", not_run):
        if "embed" in model.tasks and texts and model.embedding.spec.text is not None:
            vectors["texts"] = model.encode_text(texts, batch_size=4, truncate=True)
    accuracies: tuple[float | None, float | None, float | None] = (None, None, None)
    with _noted("embed", not_run):
        if {"images", "texts"} <= set(vectors) and (samples.pairs or samples.labelled):
            readable = [number for number in range(len(images)) if number not in set(unreadable)]
            by_number = dict(zip(readable, vectors["images"], strict=True))
            accuracies = (_zero_shot(model, samples, by_number), *_retrieval(model, samples, by_number))
    words: list[str] = []
    for name, ask in _asked(model, samples):
        with _noted(name, not_run):
            words += ask()
    return Answers(
        vectors.get("images"),
        vectors.get("texts"),
        tuple(words),
        accuracies,
        {part: seen.feeds for part, seen in session.seen.items()},
        tuple(dict.fromkeys(not_run)),
    )


def _zero_shot(model: Model, samples: SampleSet, images: Mapping[int, FloatArray]) -> float | None:
    """The share of labelled images whose nearest label is their own."""
    told = [(images[number], label) for number, label in samples.labelled if number in images]
    if not told:
        return None
    labels = model.encode_text(list(samples.labels), batch_size=4)
    nearest = (np.stack([image for image, _ in told]) @ labels.T).argmax(1)
    return float(np.mean([int(found) == label for found, (_, label) in zip(nearest, told, strict=True)]))


def _retrieval(model: Model, samples: SampleSet, images: Mapping[int, FloatArray]) -> tuple[float | None, float | None]:
    """Recall@1: of images, whose nearest text is one of theirs, and of texts, whose nearest image has that text."""
    texts_of: dict[int, set[str]] = {}
    for number, text in samples.pairs:
        if number in images:
            texts_of.setdefault(number, set()).add(text)
    numbers, texts = list(texts_of), sorted({text for found in texts_of.values() for text in found})
    if len(numbers) < 2 or len(texts) < 2:
        return None, None
    scores = np.stack([images[number] for number in numbers]) @ model.encode_text(texts, batch_size=4, truncate=True).T
    of_images = [texts[place] in texts_of[number] for number, place in zip(numbers, scores.argmax(1), strict=True)]
    of_texts = [text in texts_of[numbers[place]] for text, place in zip(texts, scores.argmax(0), strict=True)]
    return float(np.mean(of_images)), float(np.mean(of_texts))


def _asked(model: Model, samples: SampleSet) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Each other task of the model, and what asks it; it gives what is written."""
    images = list(samples.images[: min(samples.own_images, _MOST_OWN_WRITTEN) or _MOST_WRITTEN])
    if not images:
        return
    own = samples.texts[: samples.own_texts]
    asked_of, questions = images, [(own or QUESTIONS)[i % len(own or QUESTIONS)] for i in range(len(images))]
    if samples.pairs:
        asked_of = [samples.images[number] for number, _ in samples.pairs[:_MOST_OWN_WRITTEN]]
        questions = [text for _, text in samples.pairs[:_MOST_OWN_WRITTEN]]
    if "match" in model.tasks and samples.texts:
        texts = [samples.texts[i % len(samples.texts)] for i in range(len(images))]

        def match() -> list[str]:
            model.match(images, texts, truncate=True)
            return []

        yield "match", match
    caption, answer, chat = (model.tasks.get(kind) for kind in ("caption", "answer", "chat"))
    if isinstance(caption, CaptionTask):
        longest = min(_LONGEST_WRITTEN, caption.spec.max_length)
        yield "caption", lambda: caption.caption(images, beams=1, max_length=longest, min_length=0)
    if isinstance(answer, AnswerTask):
        most = min(_LONGEST_WRITTEN, answer.spec.max_length)
        yield (
            "answer",
            lambda: answer.answer(asked_of, questions, beams=1, max_length=most, min_length=0, truncate=True),
        )
    if isinstance(chat, ChatTask):
        yield "chat", lambda: chat.answer(asked_of, questions, max_new_tokens=_LONGEST_WRITTEN, truncate=True)
    if "features" in model.tasks:

        def features() -> list[str]:
            model.features(images)
            return []

        yield "features", features


@contextmanager
def _noted(task: str, not_run: list[str]) -> Iterator[None]:
    """Makes a task that the samples do not fit a note."""
    try:
        yield
    except (InputError, UsageError) as error:
        got = f": {error.got}" if error.got else ""
        not_run.append(f"the task {task!r} was not measured: {error.what}{got}")
