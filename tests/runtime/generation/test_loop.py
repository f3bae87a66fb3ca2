"""Greedy search, sampling and streaming against plain loops, recorded scores, and each other."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation.logits import adjusted_scores, draw_tokens, keep_top_k, keep_top_p, narrowed_scores
from vlm_export.runtime.generation.loop import NewToken, generate, stream
from vlm_export.runtime.generation.options import GenerationOptions, padded_ids

ToyDecoder = runpy.run_path(str(Path(__file__).with_name("toy_decoder.py")))["ToyDecoder"]
END = 2
RECORD = json.loads((Path(__file__).parents[2] / "data" / "runtime" / "generation.json").read_text("utf-8"))


def prompt_of(rows: int, length: int = 3, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 17, (rows, length))


def options_of(**given: Any) -> GenerationOptions:
    bound = {} if "max_new_tokens" in given else {"max_length": 12}
    return GenerationOptions(**{"eos_token_ids": (END,), **bound, **given})


def argmax_loop(toy: Any, row: npt.NDArray[np.int64], length: int) -> list[int]:
    ids: list[int] = row.tolist()
    logits = toy.step(row[None])
    while len(ids) < length:
        ids.append(int(logits[0].argmax()))
        if ids[-1] == END:
            break
        logits = toy.step(np.array([[ids[-1]]]))
    return ids


class FixedDecoder:
    """Gives the same logits whatever it is fed."""

    def __init__(self, logits: Any) -> None:
        self.logits = np.asarray(logits, np.float32)

    def step(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self.logits

    def select(self, rows: npt.NDArray[np.int64]) -> None:
        self.logits = self.logits[rows]


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), bonus=st.sampled_from([0.0, 1.5, 3.0]))
@settings(max_examples=60, deadline=None)
def test_greedy_is_the_argmax_of_each_row_alone(seed: int, rows: int, bonus: float) -> None:
    prompt = prompt_of(rows, seed=seed)
    batch = generate(ToyDecoder(rows, seed, end_bonus=bonus), prompt, options_of())
    assert batch == [argmax_loop(ToyDecoder(1, seed, end_bonus=bonus), row, 12) for row in prompt]


@pytest.mark.parametrize("case", [c for c in RECORD["searches"] if c["options"]["beams"] == 1])
def test_greedy_equals_transformers(case: dict[str, Any]) -> None:
    options = GenerationOptions(eos_token_ids=(END,), pad_token_id=0, **case["options"])
    rows = generate(ToyDecoder(len(case["prompt"]), **case["toy"]), np.array(case["prompt"]), options)
    assert padded_ids(rows, options).tolist() == case["ids"]


def test_the_record_has_early_late_and_no_ends() -> None:
    assert RECORD["produced_by"] == "transformers 4.25.1"
    ends = {
        tuple(END in row[len(p) :] for row, p in zip(c["ids"], c["prompt"], strict=True)) for c in RECORD["searches"]
    }
    assert (True,) in ends
    assert (False,) in ends
    assert any(len(set(batch)) == 2 for batch in ends)


def test_ended_rows_leave_the_decoder() -> None:
    prompt = prompt_of(5, seed=3)
    toy = ToyDecoder(5, 3, end_bonus=1.0)
    rows = generate(toy, prompt, options_of(max_length=15))
    lengths = sorted({len(row) for row in rows})
    assert len(lengths) > 2, "the case needs rows of several lengths"
    assert toy.fed == [(5, 3), *((sum(len(row) > length for row in rows), 1) for length in range(4, lengths[-1]))]


def test_bounds_with_and_without_the_prompt_agree() -> None:
    prompt = prompt_of(3)
    whole = generate(ToyDecoder(3), prompt, options_of(max_length=9))
    assert whole == generate(ToyDecoder(3), prompt, options_of(max_new_tokens=6))
    assert max(map(len, whole)) == 9


@pytest.mark.parametrize("kind", [{}, {"sample": True, "seed": 4}, {"beams": 3}])
def test_no_row_ends_before_the_least_length(kind: dict[str, Any]) -> None:
    prompt = prompt_of(6)
    free = generate(ToyDecoder(6, end_bonus=5.0), prompt, options_of(**kind))
    bound = generate(ToyDecoder(6, end_bonus=5.0), prompt, options_of(min_length=7, **kind))
    assert min(map(len, free)) == 4
    assert min(map(len, bound)) == 8, "the end token comes after the least length at the soonest"
    assert all(END not in row[:7] for row in bound)


def test_any_of_several_end_tokens_ends_a_row() -> None:
    plain = generate(ToyDecoder(1, 5), prompt_of(1), options_of(eos_token_ids=()))[0]
    assert len(plain) == 12
    other = plain[6]
    cut = plain[: plain.index(other, 3) + 1]
    assert generate(ToyDecoder(1, 5), prompt_of(1), options_of(eos_token_ids=(16, other, 1)))[0] == cut


def test_repetition_penalty_by_hand() -> None:
    logits = np.array([[2.0, -1.0, 0.5, 1.9]], np.float32)
    scores = adjusted_scores(logits, np.array([[0, 1, 0]]), options_of(repetition_penalty=2.0))
    assert scores.tolist() == [[1.0, -2.0, 0.5, pytest.approx(1.9)]]
    assert logits[0, 0] == 2.0, "the decoder's memory is left alone"


@pytest.mark.parametrize("case", RECORD["samplings"])
def test_scores_to_draw_from_equal_transformers(case: dict[str, Any]) -> None:
    options = options_of(min_length=5, sample=True, **case["options"])
    scores = narrowed_scores(
        adjusted_scores(np.array(case["logits"], np.float32), np.array(case["ids"]), options), options
    )
    expected = np.array([[-np.inf if one is None else one for one in row] for row in case["scores"]])
    assert np.array_equal(np.isfinite(scores), np.isfinite(expected))
    kept = np.isfinite(expected)
    # A temperature moves the best score to 0, which no probability notices.
    moved = scores[kept] - scores.max() if options.temperature != 1.0 else scores[kept]
    reference = expected[kept] - expected.max() if options.temperature != 1.0 else expected[kept]
    assert np.allclose(moved, reference, atol=1e-5)


def test_nanovlm_s_rule_leaves_the_crossing_token_out_and_cools_last() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    kept = {
        rule: np.isfinite(narrowed_scores(logits, options_of(sample=True, top_p=0.9, sampling_rule=rule))).tolist()
        for rule in ("transformers", "nanovlm")
    }
    assert kept == {"transformers": [[True, True, True, False]], "nanovlm": [[True, True, False, False]]}
    hot = options_of(sample=True, top_p=0.9, temperature=4.0, sampling_rule="nanovlm")
    scores = narrowed_scores(logits, hot)
    assert np.isfinite(scores).tolist() == kept["nanovlm"]
    assert scores[0, 1] - scores[0, 0] == pytest.approx(np.log(0.3 / 0.5) / 4)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 40), p=st.floats(1e-9, 1.0, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_narrowing_keeps_the_fewest_best_tokens(seed: int, k: int, p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal((2, 30)).astype(np.float32)
    assert (np.isfinite(keep_top_k(logits, k)).sum(axis=1) == min(k, 30)).all()
    weights = np.exp(logits.astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    for row, kept in zip(weights, np.isfinite(keep_top_p(logits, p)), strict=True):
        assert row[kept].min() >= row[~kept].max(initial=0.0)
        assert row[kept].sum() >= p - 1e-9
        assert row[kept].sum() - row[kept].min() <= p + 1e-9


@pytest.mark.parametrize(
    "kind", [{"top_p": 1e-9}, {"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-300}, {"top_k": 1, "top_p": 0.5}]
)
@pytest.mark.parametrize("rule", ["transformers", "nanovlm"])
def test_the_narrowest_sampling_is_greedy(kind: dict[str, Any], rule: Any) -> None:
    greedy = generate(ToyDecoder(4), prompt_of(4), options_of())
    assert generate(ToyDecoder(4), prompt_of(4), options_of(sample=True, sampling_rule=rule, **kind)) == greedy


def test_the_widest_sampling_is_unbounded() -> None:
    free = generate(ToyDecoder(4), prompt_of(4), options_of(sample=True, seed=1))
    assert generate(ToyDecoder(4), prompt_of(4), options_of(sample=True, seed=1, top_p=1.0, top_k=99)) == free


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.0, 0.3, 0.2, 0.0])
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities).astype(np.float32)[None]
    generator = np.random.default_rng(0)
    drawn = np.array([draw_tokens(scores, [generator])[0] for _ in range(4000)])
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    assert shares[[1, 4]].tolist() == [0.0, 0.0]
    # Four standard deviations of a share of one half.
    assert np.abs(shares - probabilities).max() < 4 * np.sqrt(0.25 / len(drawn))


def test_a_draw_at_the_edge_gives_no_impossible_token() -> None:
    class Lowest:
        def random(self) -> float:
            return 0.0

    generators: list[Any] = [Lowest()]
    assert draw_tokens(np.array([[-np.inf, 0.0, 0.0]], np.float32), generators).tolist() == [1]


def test_a_seed_repeats_and_none_does_not() -> None:
    def run(seed: int | None) -> list[list[int]]:
        return generate(ToyDecoder(3, sharpness=0.1), prompt_of(3), options_of(sample=True, seed=seed, max_length=30))

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_row_draws_the_same_in_every_batch(seed: int, rows: int) -> None:
    prompt, options = prompt_of(rows, seed=seed), options_of(sample=True, seed=seed, top_p=0.95)
    batch = generate(ToyDecoder(rows, seed, end_bonus=1.0), prompt, options)
    for number, row in enumerate(prompt):
        toy = ToyDecoder(1, seed, end_bonus=1.0)
        assert generate(toy, row[None], options, first_row=number) == [batch[number]]


def test_equal_prompts_draw_apart() -> None:
    rows = generate(ToyDecoder(6, sharpness=0.1), np.full((6, 2), 5), options_of(sample=True, seed=0))
    assert len({tuple(row) for row in rows}) == 6


@pytest.mark.parametrize("kind", [{}, {"sample": True, "seed": 9, "top_k": 6, "repetition_penalty": 1.2}])
def test_a_stream_is_what_generate_appends(kind: dict[str, Any]) -> None:
    prompt, options = prompt_of(4), options_of(**kind)
    whole = generate(ToyDecoder(4, end_bonus=1.5), prompt, options)
    rows, ended = prompt.tolist(), []
    for token in stream(ToyDecoder(4, end_bonus=1.5), prompt, options):
        assert isinstance(token, NewToken)
        assert token.row not in ended
        rows[token.row].append(token.token_id)
        ended += [token.row] * token.is_last
    assert rows == whole
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_stream_runs_the_decoder_only_as_far_as_it_is_read() -> None:
    toy = ToyDecoder(1, 5)
    tokens = stream(toy, prompt_of(1), options_of(eos_token_ids=()))
    assert toy.fed == []
    next(tokens)
    next(tokens)
    assert toy.fed == [(1, 3), (1, 1)]


def test_beams_cannot_be_streamed() -> None:
    with pytest.raises(UsageError, match="cannot be streamed") as caught:
        stream(ToyDecoder(1), prompt_of(1), options_of(beams=2))
    assert (caught.value.where, caught.value.expected, caught.value.got) == ("beams", "1", "2")


@pytest.mark.parametrize("beams", [1, 3])
def test_no_rows_are_no_work(beams: int) -> None:
    toy = ToyDecoder(0)
    assert generate(toy, np.zeros((0, 3), np.int64), options_of(beams=beams)) == []
    assert toy.fed == []
    assert padded_ids([], options_of()).shape == (0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beams", 0),
        ("beams", True),
        ("max_length", 0),
        ("max_new_tokens", -1),
        ("min_length", -1),
        ("min_length", 13),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("length_penalty", float("inf")),
        ("length_penalty", 1000.0),
        ("seed", -1),
        ("pad_token_id", -1),
        ("eos_token_ids", (5, -1)),
        ("eos_token_ids", [5]),
        ("sampling_rule", "other"),
    ],
)
def test_options_out_of_range_are_named(field: str, value: Any) -> None:
    kind = {"sample": True} if field in ("temperature", "top_k", "top_p") else {}
    with pytest.raises(UsageError) as caught:
        options_of(**{**kind, field: value})
    assert caught.value.where == field
    assert caught.value.expected
    assert caught.value.got == str(value if field != "eos_token_ids" or isinstance(value, list) else -1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_new_tokens": 3, "max_length": 9}, "both"),
        ({"max_length": None}, "neither"),
        ({"sample": True, "beams": 2}, "beams"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5, "beams": 2}, "top_k"),
        ({"temperature": 0.5}, "temperature"),
        ({"length_penalty": 2.0}, "length_penalty"),
    ],
)
def test_options_that_contradict_each_other_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options_of(**values)


@pytest.mark.parametrize("prompt", [np.zeros(3, np.int64), np.zeros((2, 0), np.int64), np.zeros((1, 2), np.float32)])
def test_prompts_of_another_form_are_refused(prompt: npt.NDArray[Any]) -> None:
    with pytest.raises(UsageError, match="one row of token ids"):
        generate(ToyDecoder(1), prompt, options_of())


@pytest.mark.parametrize("call", [generate, stream])
def test_a_prompt_that_leaves_no_room_is_refused(call: Any) -> None:
    with pytest.raises(UsageError, match="leaves no room") as caught:
        call(ToyDecoder(1), prompt_of(1, 12), options_of())
    assert caught.value.got == "12"
    with pytest.raises(UsageError, match="min_length"):
        call(ToyDecoder(1), prompt_of(1), options_of(max_new_tokens=2, min_length=6))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float, beams: int) -> None:
    with pytest.raises(InputError, match="not finite") as caught:
        generate(FixedDecoder([[0.0, 1.0, 2.0], [0.0, bad, 0.0]]), prompt_of(2), options_of(beams=beams))
    assert caught.value.got.startswith("1 of 2 rows")


def test_decoders_and_ends_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="no row of logits"):
        generate(FixedDecoder([[0.0, 1.0, 2.0]]), prompt_of(2), options_of())
    for ends in ((3,), (0, 1, 2)):
        with pytest.raises(UsageError, match="end tokens"):
            generate(FixedDecoder([[0.0, 1.0, 2.0]]), prompt_of(1), options_of(eos_token_ids=ends))
    with pytest.raises(UsageError, match="repetition penalty"):
        generate(FixedDecoder([[0.0, 1.0, 2.0]]), prompt_of(1), options_of(repetition_penalty=1.1))


@pytest.mark.parametrize("kind", [{}, {"sample": True}, {"beams": 2}])
def test_a_decoder_that_allows_nothing_but_the_end_too_soon(kind: dict[str, Any]) -> None:
    decoder = FixedDecoder([[-np.inf, -np.inf, 0.0]])
    assert generate(decoder, prompt_of(1), options_of(**kind))[0][3:] == [END]
    with pytest.raises(InputError, match="no token can follow"):
        generate(decoder, prompt_of(1), options_of(min_length=5, **kind))
