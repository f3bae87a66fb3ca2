"""Beam search against exhaustive search, recorded ids of transformers 4.25.1, and itself in batches."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions, padded_ids

ToyDecoder = runpy.run_path(str(Path(__file__).with_name("toy_decoder.py")))["ToyDecoder"]
END = 2
RECORD = json.loads((Path(__file__).parents[2] / "data" / "runtime" / "generation.json").read_text("utf-8"))
SEARCHES = [case for case in RECORD["searches"] if case["options"]["beams"] > 1]


def every_hypothesis(
    toy: Any, fed: list[int], ids: list[int], total: float, options: GenerationOptions
) -> list[tuple[float, list[int]]]:
    """All continuations of `ids` with their scores, by recursion: those that end, and those that reach the length."""
    end_length = options.max_length or 0
    if len(ids) == end_length:
        return [(total / len(ids) ** options.length_penalty, ids)]
    logits = toy.step(np.array([fed]))[0].astype(np.float64)
    log = logits - np.log(np.exp(logits).sum())
    found = []
    for token, value in enumerate(log):
        reached = total + value
        if token not in options.eos_token_ids:
            found += every_hypothesis(copy.deepcopy(toy), [token], [*ids, token], reached, options)
        elif len(ids) >= options.min_length:
            found.append((reached / len(ids) ** options.length_penalty, [*ids, token]))
    return found


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(3, 4),
    new_tokens=st.integers(1, 4),
    bonus=st.sampled_from([0.0, 1.0, 3.0]),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0, -0.5]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_beams_that_cover_everything_are_exhaustive_search(
    seed: int, vocabulary: int, new_tokens: int, bonus: float, length_penalty: float, data: st.DataObject
) -> None:
    options = GenerationOptions(
        eos_token_ids=data.draw(st.sampled_from([(2,), (), (0, 2)])),
        max_length=2 + new_tokens,
        min_length=data.draw(st.integers(0, 2 + new_tokens)),
        beams=4**5,
        length_penalty=length_penalty,
    )
    toy = {"seed": seed, "vocabulary": vocabulary, "end_bonus": bonus}
    prompt = np.random.default_rng(seed).integers(0, vocabulary, (2, 2))
    expected = [max(every_hypothesis(ToyDecoder(1, **toy), ids, ids, 0.0, options))[1] for ids in prompt.tolist()]
    assert generate(ToyDecoder(2, **toy), prompt, options) == expected


@pytest.mark.parametrize("case", SEARCHES)
def test_beam_search_equals_transformers(case: dict[str, Any]) -> None:
    options = GenerationOptions(eos_token_ids=(END,), pad_token_id=0, **case["options"])
    toy = ToyDecoder(len(case["prompt"]), **case["toy"])
    rows = generate(toy, np.array(case["prompt"]), options)
    assert padded_ids(rows, options).tolist() == case["ids"]


def test_the_record_tells_beams_from_greedy() -> None:
    differing = 0
    for case in SEARCHES:
        plain = {key: value for key, value in case["options"].items() if key not in ("beams", "length_penalty")}
        options = GenerationOptions(eos_token_ids=(END,), pad_token_id=0, **plain)
        rows = generate(ToyDecoder(len(case["prompt"]), **case["toy"]), np.array(case["prompt"]), options)
        differing += padded_ids(rows, options).tolist() != case["ids"]
    assert differing > len(SEARCHES) // 3


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 5),
    beams=st.integers(2, 6),
    bonus=st.sampled_from([0.0, 1.5, 3.0]),
    penalty=st.sampled_from([1.0, 1.4]),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_is_its_rows_alone(seed: int, rows: int, beams: int, bonus: float, penalty: float) -> None:
    options = GenerationOptions(
        eos_token_ids=(END,), max_length=12, min_length=5, beams=beams, repetition_penalty=penalty
    )
    prompt = np.random.default_rng(seed).integers(3, 17, (rows, 2))
    batch = generate(ToyDecoder(rows, seed, end_bonus=bonus), prompt, options)
    assert batch == [generate(ToyDecoder(1, seed, end_bonus=bonus), row[None], options)[0] for row in prompt]


@given(seed=st.integers(0, 10**6), beams=st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_more_end_tokens_leave_every_beam_a_continuation(seed: int, beams: int) -> None:
    """With ends that take most of the probability, live beams must not run out while others could go on."""
    ends = (2, 3, 4, 5)
    options = GenerationOptions(eos_token_ids=ends, max_length=9, min_length=0, beams=beams, length_penalty=9.0)
    toy = ToyDecoder(1, seed, vocabulary=16)
    toy.bias[list(ends)] = 4.0
    generate(toy, np.array([[7, 8]]), options)
    live = [rows for rows, _ in toy.fed[1:]]
    assert set(live) <= {beams}


def test_the_prompt_runs_once_per_item_and_done_items_leave() -> None:
    case = next(c for c in SEARCHES if len({row.index(END) if END in row else 99 for row in c["ids"]}) > 2)
    beams, items, length = case["options"]["beams"], len(case["prompt"]), len(case["prompt"][0])
    toy = ToyDecoder(items, **case["toy"])
    generate(toy, np.array(case["prompt"]), GenerationOptions(eos_token_ids=(END,), **case["options"]))
    assert toy.fed[0] == (items, length)
    fed = [rows for rows, _ in toy.fed[1:]]
    assert fed[0] == items * beams
    assert fed == sorted(fed, reverse=True)
    assert fed[-1] < fed[0]


def test_the_cache_is_reordered_only_where_beams_change_places() -> None:
    class Counting:
        """One item whose best beam never changes places with the others."""

        def __init__(self) -> None:
            self.selected: list[list[int]] = []

        def step(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            start = np.array([[0.0, -1.0, -9.0, -9.0]], np.float32)
            later = np.array([[0.0, -30.0, -30.0, -30.0]] * 2, np.float32)
            return start if token_ids.shape[1] == 2 else later

        def select(self, rows: npt.NDArray[np.int64]) -> None:
            self.selected.append(rows.tolist())

    state = Counting()
    options = GenerationOptions(eos_token_ids=(3,), max_length=8, beams=2)
    assert generate(state, np.array([[1, 1]]), options) == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert state.selected == [[0, 0]]


class TableDecoder:
    """The probabilities of the next token depend on the time alone; the last row of the table goes on for ever."""

    def __init__(self, *probabilities: list[float]) -> None:
        self.table, self.time = probabilities, 0

    def step(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        row = np.log(np.array(self.table[min(self.time, len(self.table) - 1)], np.float32))
        self.time += 1
        return np.tile(row, (len(token_ids), 1))

    def select(self, rows: npt.NDArray[np.int64]) -> None:
        pass


def test_the_length_penalty_decides_between_short_and_long() -> None:
    def best(power: float) -> list[int]:
        options = GenerationOptions(eos_token_ids=(0,), max_length=6, beams=2, length_penalty=power)
        decoder = TableDecoder([0.4, 0.6 - 1e-6, 1e-6], [0.4, 0.5, 0.1], [0.01, 0.01, 0.98])
        return generate(decoder, np.array([[1]]), options)[0]

    # Ended at once: log 0.4. Going on: log 0.6 + log 0.5 + 3 log 0.98 or less, so a smaller sum over 6 tokens.
    assert best(0.0) == [1, 0]
    assert best(1.0) == [1, 1, 1, 2, 2, 2]


def test_of_equal_hypotheses_the_last_wins() -> None:
    options = GenerationOptions(eos_token_ids=(0, 3), max_length=6, beams=2)
    assert generate(TableDecoder([0.4, 0.1, 0.1, 0.4]), np.array([[1]]), options) == [[1, 3]]
