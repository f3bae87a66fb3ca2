"""The BLIP demo's questions, vocabulary and training: true, closed, and only about what training may see."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import train_blip_demo
from demo.accuracy import held_out_images
from demo.blip import (
    IMAGE,
    RECIPE,
    BlipSchedule,
    build_pair,
    clip_vision,
    decoder_loss,
    measure_checkpoint,
    published_checkpoint,
    train,
    warm_start,
)
from demo.files import CAPTION, CLIP, DemoFiles
from demo.questions import KINDS, PLACES, PROMPT, ask, every_word, phrase
from demo.sentences import caption
from demo.tokens import bert_rows, bert_tokenizer_json, bert_vocabulary
from demo.torch_model import load_model, pixel_values
from demo.world import COMPOSITIONS, TRAINED, Composition, Drawing, draw
from tokenizers import Tokenizer
from torch import Tensor

from vlm_export.models.blip.architecture import CLS_ID, PAD_ID, SEP_ID

pytestmark = pytest.mark.usefixtures("one_thread")
TWO_CROSSES = Composition("cross", "orange", "small", "left", "two")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(bert_tokenizer_json())


def test_direct_answers_are_the_attributes() -> None:
    rng = np.random.default_rng(0)
    for composition in COMPOSITIONS[::61]:
        answers = {kind: ask(composition, kind, rng).answer for kind in KINDS}
        assert answers["shape"] == composition.shape
        assert answers["colour"] == composition.colour
        assert answers["size"] == composition.size
        assert answers["count"] in (composition.count, "zero")
        assert f"{PROMPT}{answers['what']} {answers['position']}" == caption(composition)


def test_questions_agree_in_number_and_spell() -> None:
    texts = {ask(TWO_CROSSES, kind, np.random.default_rng(seed)).text for kind in KINDS for seed in range(60)}
    said = {text.removesuffix("?") for text in texts}
    assert {"where are the crosses", "what color are they", "is there an orange cross", "what are these"} <= said
    assert not any(" is they" in text or " are it" in text or "crosss" in text or "a orange" in text for text in said)
    assert phrase(TWO_CROSSES) == "two small orange crosses"


def test_yes_is_true_and_no_is_false_of_the_image() -> None:
    rng = np.random.default_rng(1)
    answers: Counter[str] = Counter()
    for composition in COMPOSITIONS[::3]:
        question = ask(composition, "exists", rng)
        answers[question.answer] += 1
        assert (question.answer == "yes") == holds(question.text.removesuffix("?"), composition), question
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def holds(text: str, composition: Composition) -> bool:
    """Whether each word that names a value names the image's."""
    words = [word.removesuffix("es") if word == "crosses" else word for word in text.split()]
    place = [word for word in words if word in PLACES]
    values = {composition.shape, f"{composition.shape}s", composition.colour, composition.size, composition.position}
    shapes = {c.shape for c in COMPOSITIONS} | {f"{c.shape}s" for c in COMPOSITIONS}
    named = [word for word in words if word in shapes | {c.colour for c in COMPOSITIONS} | {"small", "large"}]
    return all(word in values for word in named + place)


def test_none_are_counted_only_where_there_are_none() -> None:
    rng = np.random.default_rng(2)
    zeros = 0
    for composition in COMPOSITIONS[::3]:
        question = ask(composition, "count", rng)
        zeros += question.answer == "zero"
        assert (question.answer != "zero") == holds(question.text.removesuffix("?"), composition), question
    assert 0.15 < zeros / len(COMPOSITIONS[::3]) < 0.25


def test_vocabulary_is_laid_out_as_bert_is(tokenizer: Tokenizer) -> None:
    ids = {token: tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert list(ids.values()) == [PAD_ID, 100, CLS_ID, SEP_ID, 103]
    assert bert_vocabulary()[-2:] == ["[DEC]", "[ENC]"]
    assert tokenizer.get_vocab_size() == len(bert_vocabulary()) == len(set(bert_vocabulary()))
    assert bert_vocabulary() == [tokenizer.id_to_token(i) for i in range(len(bert_vocabulary()))]


def test_every_sentence_is_known_and_comes_back(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(3)
    for composition in COMPOSITIONS[::23]:
        questions = [ask(composition, kind, rng) for kind in KINDS]
        for text in [caption(composition), *(q.text for q in questions), *(q.answer for q in questions)]:
            ids = tokenizer.encode(text.capitalize()).ids
            assert 100 not in ids
            assert (ids[0], ids[-1]) == (CLS_ID, SEP_ID)
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode("what color is the giraffe?").ids.count(100) == 1


def test_committed_tokenizer_is_the_one_that_the_words_make(tokenizer: Tokenizer) -> None:
    committed = Tokenizer.from_file(str(DemoFiles(CAPTION).tokenizer))
    assert json.loads(committed.to_str()) == json.loads(tokenizer.to_str())
    assert every_word() == bert_vocabulary()[104:-2]


def test_rows_start_with_the_id_that_is_asked_for(tokenizer: Tokenizer) -> None:
    ids, mask = bert_rows(tokenizer, ["red", "what is this?"], 181)
    assert ids[:, 0].tolist() == [181, 181]
    assert mask.sum(axis=1).tolist() == [3, 6]
    assert ids[0].tolist() == [181, tokenizer.token_to_id("red"), SEP_ID, PAD_ID, PAD_ID, PAD_ID]


def test_written_checkpoint_is_read_back_as_the_model_that_was_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pair = build_pair(tokenizer.get_vocab_size(), 0)
    path = tmp_path / "checkpoint.pth"
    torch.save(published_checkpoint(pair.answerer, pair.answerer_architecture), path)
    model = load_model(path)
    assert dict(model.architecture) == pair.answerer_architecture.to_json()
    loaded = {name: tensor for part in model.parts for name, tensor in part.module.named_parameters()}
    attention = "layers.1.attention.qkv.weight"
    assert torch.equal(loaded[attention], pair.answerer.decoder.get_parameter(attention).half().float())
    assert torch.equal(loaded["vision.class_embedding"], pair.answerer.vision.class_embedding)


def test_vision_starts_with_the_clip_demos_tokens() -> None:
    """Before the first block: exactly for the class token, up to a scale for each patch."""
    drawn = [draw(composition, i).image for i, composition in enumerate(TRAINED[::100])]
    pair = build_pair(len(bert_vocabulary()), 0)
    ours = pair.captioner.vision
    warm_start(ours, DemoFiles(CLIP).checkpoint, drawn)
    clip = clip_vision(DemoFiles(CLIP).checkpoint)
    inputs: list[Tensor] = []
    for vision in (ours, clip):
        vision.blocks[0].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        with torch.inference_mode():
            vision(pixel_values(drawn, IMAGE))
    torch.testing.assert_close(inputs[0][:, 0], inputs[1][:, 0])
    bias = clip.norm_pre.bias
    assert torch.cosine_similarity(inputs[0] - bias, inputs[1] - bias, dim=-1).min() > 0.9999
    lengths = (inputs[0] - bias).norm(dim=-1) / (inputs[1] - bias).norm(dim=-1)
    assert 0.9 < lengths.mean() < 1.1
    assert torch.equal(ours.blocks[2].get_parameter("mlp.fc1.weight"), clip.blocks[2].get_parameter("mlp.fc1.weight"))
    assert pair.answerer.vision is ours


def test_loss_is_the_mean_over_tokens_and_blind_to_padding(tokenizer: Tokenizer) -> None:
    pair = build_pair(tokenizer.get_vocab_size(), 1)
    states, tokens = torch.randn(2, 17, 192), pair.captioner_architecture.tokens
    texts = ["red", "a small red circle"]

    def loss(rows: slice) -> float:
        with torch.inference_mode():
            return decoder_loss(pair.captioner, tokenizer, texts[rows], tokens, states[rows], None).item()

    # [SEP] counts: two tokens and five.
    assert loss(slice(0, 2)) == pytest.approx((2 * loss(slice(0, 1)) + 5 * loss(slice(1, 2))) / 7, abs=1e-5)


def test_training_draws_no_held_out_image_and_moves_every_weight(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    drawn: list[Composition] = []

    def recorded(composition: Composition, *arguments: int) -> Drawing:
        drawn.append(composition)
        return draw(composition, *arguments)

    monkeypatch.setattr("demo.training.draw", recorded)
    pair = build_pair(tokenizer.get_vocab_size(), 0)
    before = [parameter.clone() for parameter in pair.parameters()]
    train(pair, tokenizer, BlipSchedule(steps=2, batch=48))
    assert len(drawn) == 96
    assert set(drawn) <= set(TRAINED)
    still = [old for old, new in zip(before, pair.parameters(), strict=True) if torch.equal(old, new)]
    assert not still


def test_script_runs_and_admits_that_two_steps_are_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path), "--threads", "1", "--images", "20", "--steps", "2", "--batch", "4"]
    assert train_blip_demo.main(options) == 1
    for files in (DemoFiles(demo, tmp_path) for demo in RECIPE.demos):
        assert files.config.is_file()
        exact = json.loads(files.report.read_text(encoding="utf-8"))["exact_match"]
        assert exact["greedy"]["exact"] < 0.2
        assert measure_checkpoint(files, held_out_images(20)).figures["exact_match"] == exact
    assert "held-out texts are exactly right" in capsys.readouterr().out
