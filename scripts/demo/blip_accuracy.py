"""The BLIP demo's metric: captions and answers that are exactly right, on held-out images. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from demo.accuracy import held_out_drawings
from demo.blip_vocab import Ids, token_rows
from demo.questions import KINDS, PROMPT, Question, ask
from demo.sentences import caption
from demo.world import HELD_OUT, Drawing
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import ImageSpec

Array = npt.NDArray[Any]
Run = Callable[[Sequence[Array]], Sequence[Array]]
_EVALUATION_SEED = 7927
_BATCH = 64
_MAX_CAPTION, _MIN_CAPTION, _MAX_ANSWER = 20, 5, 10


@dataclass(frozen=True)
class Exactness:
    """Shares in [0, 1] of texts that equal the truth, all of them and by kind."""

    texts: int
    exact: float
    by_kind: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CachedDecoder:
    """`DecoderState` over the Part `text_decoder`; nothing of it is the runtime's own."""

    def __init__(self, run: Run, keys_values: Sequence[Array], encoder_mask: Ids) -> None:
        self._run, self._encoder_mask = run, encoder_mask
        batch, heads, _, head_width = keys_values[0].shape
        empty = np.zeros((batch, heads, 0, head_width), dtype=np.float32)
        self._encoder, self._past = list(keys_values), [empty] * len(keys_values)

    def step(self, token_ids: Ids) -> npt.NDArray[np.float32]:
        length = self._past[0].shape[2] + token_ids.shape[1]
        mask = np.ones((len(token_ids), length), dtype=np.int64)
        cache: list[Array] = []
        for i in range(0, len(self._past), 2):
            cache += [*self._past[i : i + 2], *self._encoder[i : i + 2]]
        logits, *self._past = self._run([token_ids, mask, self._encoder_mask, *cache])
        last: npt.NDArray[np.float32] = logits[:, -1]
        return last

    def select(self, rows: Ids) -> None:
        self._encoder = [tensor[rows] for tensor in self._encoder]
        self._past = [tensor[rows] for tensor in self._past]
        self._encoder_mask = self._encoder_mask[rows]


@dataclass(frozen=True)
class Parts:
    """The Parts of a checkpoint by name, each a function from its inputs in order to its outputs in order."""

    run: Mapping[str, Run]
    tokenizer: Tokenizer
    image: ImageSpec
    tokens: Mapping[str, int]

    def captions(self, drawings: Sequence[Drawing], beams: int = 1) -> list[str]:
        """One for each image, without the prompt."""
        options = self._options(_MAX_CAPTION, _MIN_CAPTION, beams)
        texts: list[str] = []
        for batch in _batches(drawings):
            states = self._vision(batch)
            prompt, _ = token_rows(self.tokenizer, [PROMPT] * len(batch), self.tokens["decoder_start"])
            ones = np.ones(states.shape[:2], dtype=np.int64)
            texts += self._generate(states, ones, prompt[:, :-1], options)
        return texts

    def answers(self, asked: Sequence[tuple[Drawing, Question]], beams: int = 1) -> list[str]:
        """One for each question; padding is attended to, as in the original."""
        options = self._options(_MAX_ANSWER, 1, beams)
        texts: list[str] = []
        for batch in _batches(asked):
            ids, mask = token_rows(self.tokenizer, [q.text for _, q in batch], self.tokens["encoder_start"])
            (states,) = self.run["vqa_encoder"]([ids, mask, self._vision([drawing for drawing, _ in batch])])
            start = np.full((len(batch), 1), self.tokens["decoder_start"], dtype=np.int64)
            texts += self._generate(states, np.ones_like(mask), start, options)
        return texts

    def _vision(self, drawings: Sequence[Drawing]) -> Array:
        pixels = np.stack([preprocess_image(drawing.image, self.image) for drawing in drawings])
        return self.run["vision"]([pixels])[-1]

    def _generate(self, states: Array, mask: Ids, prompt: Ids, options: GenerationOptions) -> list[str]:
        state = CachedDecoder(self.run["text_decoder"], self.run["cross_key_values"]([states]), mask)
        rows = generate(state, prompt, options)
        return [str(self.tokenizer.decode(row[prompt.shape[1] :])) for row in rows]

    def _options(self, longest: int, shortest: int, beams: int) -> GenerationOptions:
        end = (self.tokens["sep"],)
        return GenerationOptions(eos_token_ids=end, max_length=longest, min_length=shortest, beams=beams)


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[i : i + _BATCH] for i in range(0, len(items), _BATCH)]


def held_out_images(count: int) -> list[Drawing]:
    """Spread over the held-out compositions; the same ones on every machine."""
    drawings = held_out_drawings(-(-count // len(HELD_OUT)))
    return [drawings[i * len(drawings) // count] for i in range(count)]


def held_out_questions(drawings: Sequence[Drawing]) -> list[tuple[Drawing, Question]]:
    """A question of each kind about every image; the same ones on every machine."""
    rng = np.random.default_rng(_EVALUATION_SEED)
    return [(drawing, ask(drawing.composition, kind, rng)) for drawing in drawings for kind in KINDS]


def caption_exactness(parts: Parts, drawings: Sequence[Drawing], beams: int = 1) -> Exactness:
    """Of the images' canonical captions."""
    truths = [caption(drawing.composition).removeprefix(PROMPT) for drawing in drawings]
    return exactness(parts.captions(drawings, beams), truths, ["caption"] * len(truths))


def answer_exactness(parts: Parts, drawings: Sequence[Drawing], beams: int = 1) -> Exactness:
    """Of the answers to a question of each kind about every image."""
    asked = held_out_questions(drawings)
    said = parts.answers(asked, beams)
    return exactness(said, [question.answer for _, question in asked], [question.kind for _, question in asked])


def exactness(said: Sequence[str], truths: Sequence[str], kinds: Sequence[str]) -> Exactness:
    right = np.array([text == truth for text, truth in zip(said, truths, strict=True)])
    of_kind = {kind: right[[other == kind for other in kinds]] for kind in dict.fromkeys(kinds)}
    return Exactness(len(right), float(right.mean()), {kind: float(rows.mean()) for kind, rows in of_kind.items()})
