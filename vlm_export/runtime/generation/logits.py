"""Scores of the next token: checked, adjusted, narrowed and drawn from.

Scores are float32 (N, V), one row per sequence; every function returns new arrays and leaves its input as it was,
since a decoder may own the memory of its logits. The order and the meaning of the adjustments are those of
transformers 4.25.1 (`generation/logits_process.py`), which BLIP was published with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation.options import DecoderState, GenerationOptions, IdArray
from vlm_export.runtime.inputs.images import FloatArray


def next_logits(state: DecoderState, fed: IdArray, options: GenerationOptions) -> FloatArray:
    """The decoder's logits for the token after `fed`, int64 (N, T).

    Raises:
        InputError: not one row per sequence, or a row with NaN, plus infinity or nothing but minus infinity.
        UsageError: the end tokens are not in the vocabulary, or are all of it.
    """
    logits = np.asarray(state.step(fed), np.float32)
    if logits.ndim != 2 or len(logits) != len(fed) or not logits.shape[1]:
        raise InputError(
            "a decoder returned no row of logits per sequence", expected=f"({len(fed)}, V)", got=str(logits.shape)
        )
    bad = int((~np.isfinite(logits.max(axis=1))).sum())
    if bad:
        raise InputError(
            "a decoder returned logits that are not finite",
            expected="finite logits",
            got=f"{bad} of {len(logits)} rows with NaN or infinity",
            fix="use the fp32 variant, or verify the bundle on this machine",
        )
    _check_vocabulary(options, logits.shape[1])
    return logits


def adjusted_scores(scores: FloatArray, ids: IdArray, options: GenerationOptions) -> FloatArray:
    """Scores after the repetition penalty, and without the end tokens while a row is too short.

    Args:
        scores: logits, or log-probabilities in a beam search.
        ids: int64 (N, T), what each row has so far, prompt included.

    Raises:
        InputError: no token is left for a row.
    """
    if options.repetition_penalty != 1.0:
        scores = penalise_repetition(scores, ids, options.repetition_penalty)
    if ids.shape[1] < options.min_length and options.eos_token_ids:
        scores = scores.copy()
        scores[:, list(options.eos_token_ids)] = -np.inf
    if not np.isfinite(scores.max(axis=1)).all():
        raise InputError(
            "no token can follow",
            expected="a finite score besides those of the end tokens",
            got=f"min_length {options.min_length}, repetition_penalty {options.repetition_penalty:g}",
            fix="lower min_length, or take a repetition penalty near 1",
        )
    return scores


def narrowed_scores(scores: FloatArray, options: GenerationOptions) -> FloatArray:
    """Logits of the distribution that is sampled: minus infinity for tokens that may not be drawn."""
    if options.sampling_order == "temperature_first":
        scores = _tempered(scores, options.temperature)
    if options.top_k is not None:
        scores = keep_top_k(scores, options.top_k)
    if options.top_p is not None and options.top_p < 1.0:
        scores = keep_top_p(scores, options.top_p, with_crossing=options.sampling_order == "temperature_first")
    # huggingface/nanoVLM (models/vision_language_model.py, 2025) narrows the distribution before the temperature.
    return _tempered(scores, options.temperature) if options.sampling_order == "temperature_last" else scores


def penalise_repetition(scores: FloatArray, ids: IdArray, penalty: float) -> FloatArray:
    """Negative scores of the tokens in `ids` times the penalty, positive ones divided by it; each token once.

    Source: Keskar et al. 2019, CTRL, section 4.1, with the sign handled as transformers does.

    Raises:
        UsageError: a token that the vocabulary lacks.
    """
    if ids.min() < 0 or ids.max() >= scores.shape[1]:
        raise UsageError(
            "a repetition penalty needs tokens of the vocabulary",
            where="repetition_penalty",
            expected=f"ids from 0 to {scores.shape[1] - 1}",
            got=f"{ids.min()} to {ids.max()}",
        )
    seen = np.take_along_axis(scores, ids, axis=1)
    penalised: FloatArray = scores.copy()
    factor = np.float32(penalty)
    # Extreme penalties overflow; `adjusted_scores` names that.
    with np.errstate(all="ignore"):
        np.put_along_axis(penalised, ids, np.where(seen < 0, seen * factor, seen / factor), axis=1)
    return penalised


def keep_top_k(scores: FloatArray, k: int) -> FloatArray:
    """The k best scores of each row, and those equal to the last of them; minus infinity elsewhere."""
    place = scores.shape[1] - min(k, scores.shape[1])
    threshold = np.partition(scores, place, axis=1)[:, place, None]
    narrowed: FloatArray = np.where(scores < threshold, np.float32(-np.inf), scores)
    return narrowed


def keep_top_p(scores: FloatArray, p: float, *, with_crossing: bool = True) -> FloatArray:
    """The most probable tokens of each row up to a total probability; minus infinity elsewhere.

    The most probable one always stays, and so do tokens that are as probable as the last that stays.

    Args:
        p: the total, above 0 and below 1.
        with_crossing: whether the token stays with which the total reaches p.
    """
    descending = np.sort(scores, axis=1)[:, ::-1]
    probabilities = _probabilities(descending)
    totals = np.cumsum(probabilities, axis=1)
    stays = totals - probabilities < p if with_crossing else totals <= p
    last = np.maximum(stays.sum(axis=1) - 1, 0)
    threshold = np.take_along_axis(descending, last[:, None], axis=1)
    narrowed: FloatArray = np.where(scores < threshold, np.float32(-np.inf), scores)
    return narrowed


def draw_tokens(scores: FloatArray, generators: Sequence[np.random.Generator]) -> IdArray:
    """One token per row, int64 (N,): the row's own generator gives one uniform number, the inverse CDF the token."""
    totals = np.cumsum(_probabilities(scores), axis=1)
    points = [generator.random() * row[-1] for generator, row in zip(generators, totals, strict=True)]
    drawn = [np.searchsorted(row, point, side="right") for row, point in zip(totals, points, strict=True)]
    return np.array(drawn, np.int64)


def log_probabilities(logits: FloatArray) -> FloatArray:
    """Logarithm of the softmax of each row; its sum is taken in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    totals = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    log: FloatArray = shifted - np.log(totals).astype(np.float32)
    return log


def _tempered(scores: FloatArray, temperature: float) -> FloatArray:
    """Scores over the temperature, the best moved to 0: a low temperature leaves it alone instead of overflowing."""
    if temperature == 1.0:
        return scores
    shifted = (scores - scores.max(axis=1, keepdims=True)).astype(np.float64)
    with np.errstate(over="ignore"):
        tempered: FloatArray = (shifted / temperature).astype(np.float32)
    return tempered


def _probabilities(scores: FloatArray) -> npt.NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def _check_vocabulary(options: GenerationOptions, size: int) -> None:
    ends = set(options.eos_token_ids)
    if ends and (max(ends) >= size or len(ends) == size):
        raise UsageError(
            "the end tokens do not fit the decoder's vocabulary",
            where="eos_token_ids",
            expected=f"ids from 0 to {size - 1}, not all of them",
            got=str(sorted(ends)),
        )
