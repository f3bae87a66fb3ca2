"""Answers of an exported bundle, written and ranked, against the original's records, and what is asked in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export import Model
from vlm_export.errors import InputError, UsageError

pytestmark = pytest.mark.needs_torch

LONG = "the cat is on the table " * 12


def test_answers_are_the_originals(recorded: Callable[[str], Any]) -> None:
    it = recorded("vqa")
    questions = it.strings["questions"]
    assert it.model.answer(it.images, questions) == it.strings["generated_text"]["text_beam3"]
    one_by_one = [it.model.answer(*pair, attend_padding=False)[0] for pair in zip(it.images, questions, strict=True)]
    for batch_size in (1, 2, 3):
        assert it.model.answer(it.images, questions, attend_padding=False, batch_size=batch_size) == one_by_one


def test_padding_is_attended_to_only_when_asked(
    recorded: Callable[[str], Any], assert_same: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = recorded("vqa")
    engine = it.model.session.engine("text_decoder")
    for attend, name in ((True, "ones"), (False, "pad"), (None, "ones")):
        logits: list[Any] = []

        def run(feeds: Any, run: Any = engine.run, logits: list[Any] = logits) -> Any:
            outputs = run(feeds)
            logits.append(outputs["logits"])
            return outputs

        monkeypatch.setattr(engine, "run", run)
        it.model.answer(it.images, it.strings["questions"], attend_padding=attend, beams=1)
        monkeypatch.undo()
        it = recorded("vqa")
        engine = it.model.session.engine("text_decoder")
        assert_same(logits[0], it.record[f"output.first_answer_logits_mask_{name}"])


def test_ranked_answers_are_the_originals(recorded: Callable[[str], Any]) -> None:
    it = recorded("vqa")
    questions, candidates = it.strings["questions"], it.strings["answers"]
    expected = it.record["output.rank_answer_idx_k4"].tolist()
    for batch_size in (1, 3):
        ranked = it.model.rank_answers(it.images, questions, candidates, rank_k=4, batch_size=batch_size)
        assert [answers[0].index for answers in ranked] == expected
        assert [len(answers) for answers in ranked] == [4, 4, 4]
    best = [candidates[i] for i in expected]
    assert it.model.answer(it.images, questions, candidates=candidates[:4]) == best
    assert it.model.answer(it.images, questions, candidates=candidates, rank_k=4) == best


def test_scores_are_the_smoothed_losses_of_the_original(recorded: Callable[[str], Any]) -> None:
    # The record holds the logits for candidates 4 to 6, one for each question.
    it = recorded("vqa")
    ranked = it.model.rank_answers(it.images, it.strings["questions"], it.strings["answers"])
    for question in range(3):
        candidate = 4 + question
        targets = it.record["input.answer_ids"][candidate][1:]
        logits = it.record["output.logits_teacher_forced"][question, :-1].astype(np.float64)
        log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = log[np.arange(len(targets)), targets]
        expected = (0.9 * own + 0.1 * log.mean(axis=1))[targets != 0].sum()
        (score,) = [answer.score for answer in ranked[question] if answer.index == candidate]
        assert score == pytest.approx(expected, abs=1e-4)
        scores = [answer.score for answer in ranked[question]]
        assert scores == sorted(scores, reverse=True)


def test_candidates_may_be_odd(blip_model: Callable[[str], Model], image: Image.Image) -> None:
    model = blip_model("vqa")
    odd = ["", "yes", "[PAD]", "yes", "[SEP] [SEP]", LONG[:50]]
    (ranked,) = model.rank_answers(image, "what is this", odd)
    assert sorted(answer.index for answer in ranked) == list(range(6))
    assert all(np.isfinite(answer.score) for answer in ranked)
    twins = [answer.index for answer in ranked if answer.text == "yes"]
    assert twins == [1, 3]
    alone = {model.rank_answers(image, "what is this", [text])[0][0].score for text in odd}
    assert sorted(alone) == pytest.approx(sorted({answer.score for answer in ranked}), abs=1e-4)
    no_lists: tuple[Any, ...] = ([], "yes")
    for wrong in no_lists:
        with pytest.raises(UsageError, match="list of candidates"):
            model.rank_answers(image, "what", wrong)
    with pytest.raises(UsageError, match="rank_k must be"):
        model.rank_answers(image, "what", ["yes"], rank_k=0)
    with pytest.raises(UsageError, match="ranked, not written"):
        model.answer(image, "what", candidates=["yes"], beams=2)


@pytest.mark.parametrize("text", ["", "...", "[SEP]", "[CLS] [SEP] [PAD]", "[ENC][DEC]", "\n"])
def test_odd_questions_have_answers(blip_model: Callable[[str], Model], image: Image.Image, text: str) -> None:
    for clean in (True, False):
        assert isinstance(blip_model("vqa").answer(image, text, clean=clean)[0], str)


def test_over_long_questions_are_refused_or_cut(blip_model: Callable[[str], Model], image: Image.Image) -> None:
    model = blip_model("vqa")
    with pytest.raises(InputError, match="too long for the model") as caught:
        model.answer(image, LONG)
    assert "at most 35 tokens" in caught.value.expected
    assert caught.value.fix
    words = " ".join(LONG.split()[:33])
    assert model.answer(image, LONG, truncate=True) == model.answer(image, words)
    assert model.rank_answers(image, LONG, ["yes"], truncate=True)


def test_an_image_of_one_pixel_has_results(blip_model: Callable[[str], Model]) -> None:
    pixel, plain = Image.new("RGB", (1, 1), "red"), Image.new("RGB", (64, 64), "red")
    assert blip_model("vqa").answer(pixel, "what is it") == blip_model("vqa").answer(plain, "what is it")
