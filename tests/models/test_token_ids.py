"""Example token ids: every row of an embedding may stand where the outputs read it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vlm_export.family import Model
from vlm_export.models.reading.token_ids import random_ids


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 99])
@pytest.mark.parametrize("without", [None, 0, 1])
def test_ids_are_in_the_vocabulary_and_leave_one_out(vocab_size: int, without: int | None) -> None:
    for seed in range(20):
        ids = random_ids(np.random.default_rng(seed), (3, 7), vocab_size, without=without)
        assert (ids.shape, str(ids.dtype)) == ((3, 7), "int64")
        assert set(ids.flat) <= set(range(vocab_size))
        assert vocab_size == 1 or not (ids == without).any()
        assert {0, vocab_size - 1, 1, vocab_size - 2} - {without, -1, vocab_size} <= {*ids[0].tolist(), without}


def test_all_ids_but_one_are_alike() -> None:
    ids = random_ids(np.random.default_rng(0), (300, 100), 10, without=4)
    assert set(ids.flat) == set(range(10)) - {4}
    counts = np.bincount(ids[1:].flat, minlength=10)
    assert counts[counts > 0].min() > 0.9 * counts.max()


@pytest.mark.parametrize("seed", range(5))
def test_clips_edges_stand_before_the_end(oracle_model: Callable[[str], Model], seed: int) -> None:
    text = oracle_model("vit_p14/state_dict_fp32.pt").parts[1]
    row = text.examples({"batch": 1, "sequence": 20}, seed)["input_ids"][0].tolist()
    assert {0, 1, 198} <= set(row[: row.index(199)])
