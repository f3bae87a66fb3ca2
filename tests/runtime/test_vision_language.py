"""Captions, answers and matches of exported bundles against the original's records, and what is asked in vain."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlm_export.runtime.vision_language import VisionLanguage

from vlm_export import load, load_vision_language
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation import loop as generation
from vlm_export.runtime.tasks import caption as captioning
from vlm_export.runtime.tasks import embed as pair_module
from vlm_export.runtime.tasks.embed import EncoderPair

pytestmark = pytest.mark.needs_torch

DATA = Path(__file__).parents[1] / "data"
LONG = "the cat is on the table " * 12


class Recorded:
    """A variant's model whose pictures are the recorded pixels: picture i is one pixel with red = i."""

    def __init__(self, model: VisionLanguage, record: dict[str, Any]) -> None:
        self.model, self.record = model, record
        self.pictures = [Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(3)]
        self.strings = record["strings"]


@pytest.fixture
def recorded(
    blip_bundle: Callable[[str], Path],
    blip_record: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Recorded]:
    def open_variant(variant: str) -> Recorded:
        record = blip_record(variant)

        def pixels(image: Image.Image, spec: object, *, name: str) -> Any:
            red = image.getpixel((0, 0))
            assert isinstance(red, tuple)
            return record["input.image"][int(red[0])]

        monkeypatch.setattr(pair_module, "preprocess_image", pixels)
        return Recorded(load_vision_language(blip_bundle(variant), threads=1), record)

    return open_variant


@pytest.fixture
def model_of(blip_bundle: Callable[[str], Path]) -> Callable[[str], VisionLanguage]:
    return lambda variant: load_vision_language(blip_bundle(variant), threads=1)


@pytest.fixture
def picture() -> Image.Image:
    image = Image.open(DATA / "blip" / "caption" / "image.png")
    image.load()  # Closes the file.
    return image


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_captions_are_the_originals(recorded: Callable[[str], Recorded], batch_size: int) -> None:
    it = recorded("caption")
    expected = it.strings["generated_text"]
    assert it.model.caption(it.pictures, batch_size=batch_size) == expected["text_beam3"]
    assert it.model.caption(it.pictures, beams=1, batch_size=batch_size) == expected["text_beam1"]
    assert it.model.caption(it.pictures[0]) == expected["text_beam3"][:1]


def test_sampled_captions_depend_on_the_seed_alone(recorded: Callable[[str], Recorded]) -> None:
    it = recorded("caption")
    sampled = it.model.caption(it.pictures, sample=True, seed=1)
    assert sampled == it.model.caption(it.pictures, sample=True, seed=1, batch_size=2)
    assert sampled != it.model.caption(it.pictures, sample=True, seed=2)
    assert sampled == it.model.caption(it.pictures, sample=True, seed=1, repetition_penalty=1.1)
    greedy = it.model.caption(it.pictures, beams=1)
    assert it.model.caption(it.pictures, sample=True, top_k=1, seed=9, repetition_penalty=1.0) == greedy


def test_lengths_count_the_prompt(model_of: Callable[[str], VisionLanguage], picture: Image.Image) -> None:
    model = model_of("caption")
    assert model.prompt_ids().tolist() == [155, *model.tokenizer.encode_rows(["a picture of"])[0][1:-1]]
    short = model.caption(picture, max_length=5, beams=1)[0]
    assert len(model.tokenizer.encode_rows([short])[0]) <= 3
    with pytest.raises(UsageError, match="no room after the prompt"):
        model.caption(picture, max_length=4)
    with pytest.raises(UsageError, match="positions"):
        model.caption(picture, max_length=65)
    with pytest.raises(UsageError, match="min_length"):
        model.caption(picture, min_length=30)


@pytest.mark.parametrize("prompt", ["", "the cat is", "The CAT  is ", "is the cat's", "[SEP] the cat"])
def test_any_prompt_is_cut_off_again(
    model_of: Callable[[str], VisionLanguage], picture: Image.Image, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generated = model_of("caption"), list[list[int]]()

    def generate(*arguments: Any, **options: Any) -> list[list[int]]:
        generated.extend(generation.generate(*arguments, **options))
        return generated

    monkeypatch.setattr(captioning, "generate", generate)
    (caption,) = model.caption(picture, prompt=prompt, beams=1)
    ids = model.prompt_ids(prompt).tolist()
    start, whole = model.tokenizer.decode(ids), model.tokenizer.decode(generated[0])
    assert generated[0][: len(ids)] == ids
    assert caption
    assert caption == caption.strip()
    assert (start + caption).replace(" ", "") == whole.replace(" ", "")


def test_an_over_long_prompt_is_refused(model_of: Callable[[str], VisionLanguage], picture: Image.Image) -> None:
    with pytest.raises(InputError, match="too long for the model"):
        model_of("caption").caption(picture, prompt=LONG)


def test_answers_are_the_originals(recorded: Callable[[str], Recorded]) -> None:
    it = recorded("vqa")
    questions = it.strings["questions"]
    assert it.model.answer(it.pictures, questions) == it.strings["generated_text"]["text_beam3"]
    one_by_one = [it.model.answer(*pair, attend_padding=False)[0] for pair in zip(it.pictures, questions, strict=True)]
    for batch_size in (1, 2, 3):
        assert it.model.answer(it.pictures, questions, attend_padding=False, batch_size=batch_size) == one_by_one


def test_padding_is_attended_to_only_when_asked(
    recorded: Callable[[str], Recorded], assert_same: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = recorded("vqa")
    engine = it.model.engine("text_decoder")
    for attend, name in ((True, "ones"), (False, "pad"), (None, "ones")):
        logits: list[Any] = []

        def run(feeds: Any, run: Any = engine.run, logits: list[Any] = logits) -> Any:
            outputs = run(feeds)
            logits.append(outputs["logits"])
            return outputs

        monkeypatch.setattr(engine, "run", run)
        it.model.answer(it.pictures, it.strings["questions"], attend_padding=attend, beams=1)
        monkeypatch.undo()
        it = recorded("vqa")
        engine = it.model.engine("text_decoder")
        assert_same(logits[0], it.record[f"output.first_answer_logits_mask_{name}"])


def test_ranked_answers_are_the_originals(recorded: Callable[[str], Recorded]) -> None:
    it = recorded("vqa")
    questions, candidates = it.strings["questions"], it.strings["answers"]
    expected = it.record["output.rank_answer_idx_k4"].tolist()
    for batch_size in (1, 3):
        ranked = it.model.rank_answers(it.pictures, questions, candidates, rank_k=4, batch_size=batch_size)
        assert [answers[0].index for answers in ranked] == expected
        assert [len(answers) for answers in ranked] == [4, 4, 4]
    best = [candidates[i] for i in expected]
    assert it.model.answer(it.pictures, questions, candidates=candidates[:4]) == best
    assert it.model.answer(it.pictures, questions, candidates=candidates, rank_k=4) == best


def test_scores_are_the_smoothed_losses_of_the_original(recorded: Callable[[str], Recorded]) -> None:
    # The record holds the logits for candidates 4 to 6, one for each question.
    it = recorded("vqa")
    ranked = it.model.rank_answers(it.pictures, it.strings["questions"], it.strings["answers"])
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


def test_candidates_may_be_odd(model_of: Callable[[str], VisionLanguage], picture: Image.Image) -> None:
    model = model_of("vqa")
    odd = ["", "yes", "[PAD]", "yes", "[SEP] [SEP]", LONG[:50]]
    (ranked,) = model.rank_answers(picture, "what is this", odd)
    assert sorted(answer.index for answer in ranked) == list(range(6))
    assert all(np.isfinite(answer.score) for answer in ranked)
    twins = [answer.index for answer in ranked if answer.text == "yes"]
    assert twins == [1, 3]
    alone = {model.rank_answers(picture, "what is this", [text])[0][0].score for text in odd}
    assert sorted(alone) == pytest.approx(sorted({answer.score for answer in ranked}), abs=1e-4)
    no_lists: tuple[Any, ...] = ([], "yes")
    for wrong in no_lists:
        with pytest.raises(UsageError, match="list of candidates"):
            model.rank_answers(picture, "what", wrong)
    with pytest.raises(UsageError, match="rank_k must be"):
        model.rank_answers(picture, "what", ["yes"], rank_k=0)
    with pytest.raises(UsageError, match="ranked, not written"):
        model.answer(picture, "what", candidates=["yes"], beams=2)


@pytest.mark.parametrize("convention", ["enc", "cls"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_matches_are_the_originals(recorded: Callable[[str], Recorded], convention: Any, batch_size: int) -> None:
    it = recorded("retrieval")
    matches = it.model.match(it.pictures, it.strings["captions"], first_token=convention, batch_size=batch_size)
    logits = it.record[f"output.itm_logits_{convention}"].astype(np.float64)
    shares = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    assert [match.first_token for match in matches] == [convention] * 3
    assert [match.probability for match in matches] == pytest.approx(shares.tolist(), abs=1e-4)
    assert [match.match_logit for match in matches] == pytest.approx(logits[:, 1].tolist(), abs=1e-4)
    expected = it.record["output.itc_sim"].diagonal().tolist()
    assert [match.cosine for match in matches] == pytest.approx(expected, abs=1e-4)
    assert matches[0].retrieval_score == matches[0].match_logit + matches[0].cosine


def test_the_encoder_pair_is_the_originals(
    recorded: Callable[[str], Recorded], assert_same: Callable[..., None]
) -> None:
    it = recorded("retrieval")
    images, texts = it.model.encode_image(it.pictures), it.model.encode_text(it.strings["captions"])
    assert_same(images, it.record["output.image_feat"])
    assert_same(texts, it.record["output.text_feat"])
    assert np.abs(images @ texts.T - it.record["output.itc_sim"]).max() <= 1e-4


def test_one_picture_or_one_text_serves_all(recorded: Callable[[str], Recorded]) -> None:
    it = recorded("retrieval")
    captions = it.strings["captions"]
    grid = [[it.model.match(picture, text)[0].match_logit for text in captions] for picture in it.pictures]
    for i in range(3):
        row = [match.match_logit for match in it.model.match(it.pictures[i], captions, batch_size=2)]
        assert row == pytest.approx(grid[i], abs=1e-5)
        column = [match.match_logit for match in it.model.match(it.pictures, captions[i], batch_size=2)]
        assert column == pytest.approx([line[i] for line in grid], abs=1e-5)
    assert it.model.match([], captions[:1]) == []
    assert it.model.match(it.pictures[0], []) == []
    with pytest.raises(UsageError, match="do not pair up"):
        it.model.match(it.pictures, captions[:2])


def test_the_bundle_names_its_own_convention(model_of: Callable[[str], VisionLanguage], picture: Image.Image) -> None:
    model = model_of("retrieval")
    assert model.match(picture, "red")[0].first_token == "enc"
    wrong: Any = "dec"
    with pytest.raises(UsageError, match="unknown first token"):
        model.match(picture, "red", first_token=wrong)


def test_texts_are_cleaned_where_the_originals_datasets_are(
    model_of: Callable[[str], VisionLanguage], picture: Image.Image
) -> None:
    model = model_of("retrieval")
    texts = ["The cat (on) the table!", "the cat on the table"]
    left, right = model.match(picture, texts)
    assert left.text == right.text == "the cat on the table"
    assert left.match_logit == pytest.approx(right.match_logit, abs=1e-5)
    left, right = model.match(picture, texts, first_token="cls")
    assert left.text == texts[0]
    assert abs(left.match_logit - right.match_logit) > 1e-3
    assert model.match(picture, texts[0], first_token="cls", clean=True)[0].text == texts[1]
    assert model.match(picture, texts[0], clean=False)[0].text == texts[0]


@pytest.mark.parametrize("text", ["", "...", "[SEP]", "[CLS] [SEP] [PAD]", "[ENC][DEC]", "\n"])
def test_odd_texts_have_results(model_of: Callable[[str], VisionLanguage], picture: Image.Image, text: str) -> None:
    matcher, asker = model_of("retrieval"), model_of("vqa")
    for clean in (True, False):
        # In a batch with a longer text as alone.
        alone = matcher.match(picture, text, clean=clean)[0]
        both = matcher.match(picture, [text, "the cat is on the table"], clean=clean)[0]
        assert np.isfinite([alone.probability, alone.cosine]).all()
        assert both.match_logit == pytest.approx(alone.match_logit, abs=1e-5)
        assert both.cosine == pytest.approx(alone.cosine, abs=1e-5)
        assert isinstance(asker.answer(picture, text, clean=clean)[0], str)


def test_over_long_texts_are_refused_or_cut(model_of: Callable[[str], VisionLanguage], picture: Image.Image) -> None:
    matcher, asker = model_of("retrieval"), model_of("vqa")
    for ask in (matcher.match, asker.answer):
        with pytest.raises(InputError, match="too long for the model") as caught:
            ask(picture, LONG)
        assert "at most 35 tokens" in caught.value.expected
        assert caught.value.fix
    words = LONG.split()[:33]
    cut = matcher.match(picture, LONG, truncate=True)[0]
    assert cut.match_logit == pytest.approx(matcher.match(picture, " ".join(words))[0].match_logit, abs=1e-5)
    assert asker.answer(picture, LONG, truncate=True) == asker.answer(picture, " ".join(words))
    assert asker.rank_answers(picture, LONG, ["yes"], truncate=True)


def test_a_picture_of_one_pixel_has_results(model_of: Callable[[str], VisionLanguage]) -> None:
    pixel, plain = Image.new("RGB", (1, 1), "red"), Image.new("RGB", (64, 64), "red")
    assert model_of("caption").caption(pixel) == model_of("caption").caption(plain)
    assert model_of("vqa").answer(pixel, "what is it") == model_of("vqa").answer(plain, "what is it")
    assert model_of("retrieval").match(pixel, "red") == model_of("retrieval").match(plain, "red")


def test_pictures_that_cannot_be_read_are_named(model_of: Callable[[str], VisionLanguage], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        model_of("caption").caption(tmp_path / "broken.png")
    assert "broken.png" in caught.value.where


def test_what_a_checkpoint_was_not_trained_for_is_refused(
    model_of: Callable[[str], VisionLanguage], picture: Image.Image
) -> None:
    caption, vqa, retrieval = (model_of(variant) for variant in ("caption", "vqa", "retrieval"))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: vqa.caption(picture), "caption"),
        (lambda: retrieval.caption(picture), "caption"),
        (lambda: caption.answer(picture, "what"), "vqa"),
        (lambda: retrieval.rank_answers(picture, "what", ["yes"]), "vqa"),
        (lambda: caption.match(picture, "red"), "retrieval"),
        (lambda: vqa.match(picture, "red"), "retrieval"),
        (lambda: caption.encode_image(picture), "retrieval"),
        (lambda: vqa.encode_text("red"), "retrieval"),
    ]
    for ask, kind in refused:
        with pytest.raises(InputError, match="this bundle") as caught:
            ask()
        assert kind in caught.value.fix


def test_a_file_of_pretraining_does_all_but_answers(recorded: Callable[[str], Recorded]) -> None:
    it = recorded("feature_extractor")
    assert len(it.model.caption(it.pictures, beams=1)) == 3
    assert len(it.model.match(it.pictures, it.strings["captions"])) == 3
    assert it.model.encode_text("red").shape == it.model.encode_image(it.pictures[0]).shape
    with pytest.raises(InputError, match="cannot answer"):
        it.model.answer(it.pictures[0], "what")


def test_it_travels_to_workers(model_of: Callable[[str], VisionLanguage], picture: Image.Image) -> None:
    model = model_of("caption")
    expected = model.caption(picture, beams=1)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is VisionLanguage
    assert again.caption(picture, beams=1) == expected


def test_load_opens_what_the_bundle_is(blip_bundle: Callable[[str], Path]) -> None:
    for variant in ("caption", "vqa", "retrieval"):
        assert isinstance(load(blip_bundle(variant)), VisionLanguage)
    assert type(load(DATA / "runtime" / "tiny_bundle")) is EncoderPair
    clip = load_vision_language(DATA / "runtime" / "tiny_bundle")
    with pytest.raises(InputError, match="cannot caption"):
        clip.caption(Image.new("RGB", (1, 1)))
