"""What counts in the score of a candidate: its tokens and its end, not its padding; and which are scored at all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import Array, TensorInfo
from vlm_export.runtime.generation.cross_attention_decoder import CrossAttentionState
from vlm_export.runtime.tasks.answer import Candidates, RankedAnswer, rank_candidates

VOCABULARY, START, END, PAD = 8, 1, 2, 0


class Constant:
    """A decoder whose next token has the same logits everywhere."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = np.array(logits, np.float32)
        self.inputs: tuple[TensorInfo, ...] = tuple(
            TensorInfo(f"past_key_values.0.{kind}", "float32", ("batch", 1, "tokens", 1))
            for kind in ("decoder.key", "encoder.key")
        )
        self.outputs: tuple[TensorInfo, ...] = ()
        self.batches: list[int] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        shape = feeds["input_ids"].shape
        self.batches.append(shape[0])
        cache = np.zeros((shape[0], 1, feeds["attention_mask"].shape[1], 1), np.float32)
        return {"logits": np.broadcast_to(self.logits, (*shape, VOCABULARY)), "present.0.decoder.key": cache}


def ranked(
    logits: list[float], answers: list[list[int]], k: int = 9, smoothing: float = 0.0, batch_size: int = 2
) -> tuple[list[RankedAnswer], list[int]]:
    decoder = Constant(logits)
    keys = {"present.0.encoder.key": np.zeros((1, 1, 3, 1), np.float32)}
    state = CrossAttentionState(decoder, keys, np.ones((1, 3), np.int64))
    rows = tuple((START, *answer, END) for answer in answers)
    candidates = Candidates(tuple(map(str, answers)), rows)
    (found,) = rank_candidates(
        state, candidates, k=k, pad_token_id=PAD, label_smoothing=smoothing, batch_size=batch_size
    )
    return found, decoder.batches


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_token_counts_and_padding_does_not(smoothing: float) -> None:
    answers = [[3], [3, 4, 5], [], [PAD], [3, PAD], [6]]
    found, _ = ranked([0.0] * VOCABULARY, answers, smoothing=smoothing)
    counts = {answer.index: round(-answer.score / np.log(VOCABULARY), 6) for answer in found}
    assert counts == {0: 2, 1: 4, 2: 1, 3: 1, 4: 2, 5: 2}
    # Equal scores come in the order of the candidates.
    assert [answer.index for answer in found] == [2, 3, 0, 4, 5, 1]


def test_only_the_most_probable_first_tokens_are_scored() -> None:
    logits = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0]
    found, batches = ranked(logits, [[3], [6, 6], [4], [5]], k=2, batch_size=1)
    assert {answer.index for answer in found} == {1, 3}
    assert found[0].text == "[6, 6]"
    assert batches == [1, 1, 1]


def test_smoothing_is_the_mean_over_the_vocabulary() -> None:
    logits = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    log = logits - np.log(np.exp(logits).sum())
    (answer,), _ = ranked(logits.tolist(), [[6]], smoothing=0.25)
    expected = 0.75 * (log[6] + log[END]) + 2 * 0.25 * log.mean()
    assert answer.score == pytest.approx(expected, abs=1e-5)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        ranked([float("nan")] * VOCABULARY, [[3]])
