"""What a generation is asked for, and what it asks of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from typing import Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from vlm_export.errors import UsageError
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.specs.tasks import SamplingOrder

IdArray: TypeAlias = npt.NDArray[np.int64]


class DecoderState(Protocol):
    """N rows that are being decoded, with their caches, masks and positions."""

    def step(self, token_ids: IdArray) -> FloatArray:
        """Feeds int64 (N, T), T new tokens for each row; returns the last one's logits, float32 (N, V)."""
        ...

    def select(self, rows: IdArray) -> None:
        """Makes rows int64 (M,) of the present ones the new rows: they may be repeated, reordered and left out."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How tokens are chosen and when to stop.

    Attributes:
        eos_token_ids: tokens that end a row; () decodes up to the greatest length.
        pad_token_id: what `padded_ids` fills short rows with. Never fed to the decoder.
        max_length: greatest length of a row with its prompt. Exactly one of this and `max_new_tokens` is given.
        max_new_tokens: greatest number of tokens after the prompt.
        min_length: no row ends before it has this length with its prompt (an end token comes after it at the soonest).
        beams: hypotheses kept by the beam search; 1 is greedy search, or sampling.
        length_penalty: a hypothesis counts as its log-probability divided by its length with prompt to this power.
        sample: draw tokens instead of taking the most probable.
        temperature, top_k, top_p: the distribution to draw from; None keeps all tokens.
        sampling_order: how the three combine, see `SamplingOrder`.
        repetition_penalty: divides positive and multiplies negative scores of the tokens that a row has, its prompt
            included. With beams the scores are log-probabilities, otherwise logits.
        seed: of the draws, which are reproducible with equal logits but are not torch's. None: another each time.

    Raises:
        UsageError: a value out of its range, or values that contradict each other.
    """

    eos_token_ids: tuple[int, ...]
    pad_token_id: int = 0
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    sampling_order: SamplingOrder = "temperature_first"
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_ranges(self)
        if (self.max_length is None) == (self.max_new_tokens is None):
            got = "neither" if self.max_length is None else "both"
            raise UsageError("one bound on the length is needed", expected="max_length or max_new_tokens", got=got)
        if self.max_length is not None and self.min_length > self.max_length:
            _refuse("min_length", f"at most max_length, {self.max_length}", self.min_length)
        if self.sample and self.beams > 1:
            _refuse("beams", "1 with sample", self.beams, "sample without beams, or search without sampling")
        if self.beams == 1 and self.length_penalty != 1.0:
            _refuse("length_penalty", "1.0 without beams", self.length_penalty, "ask for 2 beams or more")
        if not self.sample:
            for name, neutral in (("temperature", 1.0), ("top_k", None), ("top_p", None)):
                if getattr(self, name) != neutral:
                    _refuse(name, f"{neutral} without sample", getattr(self, name), "ask for sampling")

    def end_length(self, prompt_length: int) -> int:
        """The length, prompt included, at which every row stops.

        Raises:
            UsageError: the prompt leaves no room for a token, or `min_length` cannot be reached.
        """
        if self.max_length is None:
            end = prompt_length + (self.max_new_tokens or 0)
            if self.min_length > end:
                _refuse("min_length", f"at most the prompt and max_new_tokens, {end}", self.min_length)
            return end
        if prompt_length >= self.max_length:
            raise UsageError(
                "max_length leaves no room after the prompt",
                expected=f"more than the prompt's {prompt_length} tokens",
                got=str(self.max_length),
                fix="shorten the prompt or raise max_length",
            )
        return self.max_length


def checked_prompt(prompt: IdArray) -> IdArray:
    """The prompt as int64 (B, T); UsageError unless it is a matrix of integers with T ≥ 1."""
    ids = np.asarray(prompt)
    if ids.ndim != 2 or ids.shape[1] < 1 or ids.dtype.kind not in "iu":
        got = f"{ids.dtype} {ids.shape}"
        raise UsageError("a prompt is one row of token ids per item", expected="int64 (B, T), T ≥ 1", got=got)
    return ids.astype(np.int64)


def padded_ids(rows: Sequence[Sequence[int]], options: GenerationOptions) -> IdArray:
    """Rows of several lengths as int64 (B, longest), filled up with the pad token."""
    ids = np.full((len(rows), max(map(len, rows), default=0)), options.pad_token_id, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def _check_ranges(options: GenerationOptions) -> None:
    for name in ("beams", "max_length", "max_new_tokens", "top_k"):
        _check_whole(name, getattr(options, name), 1, optional=name != "beams")
    for name in ("min_length", "pad_token_id"):
        _check_whole(name, getattr(options, name), 0)
    _check_whole("seed", options.seed, 0, optional=True)
    if not isinstance(options.eos_token_ids, tuple):
        _refuse("eos_token_ids", "a tuple of token ids", options.eos_token_ids)
    for token in options.eos_token_ids:
        _check_whole("eos_token_ids", token, 0)
    _check_number("temperature", options.temperature, above=0.0)
    _check_number("repetition_penalty", options.repetition_penalty, above=0.0)
    # A length to a higher power than this may be no finite number.
    _check_number("length_penalty", options.length_penalty, above=-50.0, at_most=50.0)
    if options.top_p is not None:
        _check_number("top_p", options.top_p, above=0.0, at_most=1.0)
    if options.sampling_order not in get_args(SamplingOrder):
        _refuse("sampling_order", " or ".join(get_args(SamplingOrder)), options.sampling_order)


def _check_whole(name: str, value: object, lowest: int, *, optional: bool = False) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest
    if not whole and not (optional and value is None):
        _refuse(name, f"a whole number, at least {lowest}", value)


def _check_number(name: str, value: float, *, above: float = -inf, at_most: float = inf) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not isfinite(value) or not above < value <= at_most:
        bounds = [f"above {above:g}"] * isfinite(above) + [f"at most {at_most:g}"] * isfinite(at_most)
        _refuse(name, ", ".join(["a finite number", *bounds]), value)


def _refuse(field: str, expected: str, got: object, fix: str = "") -> None:
    raise UsageError(f"the generation option {field} is wrong", where=field, expected=expected, got=str(got), fix=fix)
