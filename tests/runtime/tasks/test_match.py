"""Matches of an exported bundle and its embeddings against the original's records, and what is asked in vain."""

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


@pytest.mark.parametrize("convention", ["enc", "cls"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_matches_are_the_originals(recorded: Callable[[str], Any], convention: Any, batch_size: int) -> None:
    it = recorded("retrieval")
    matches = it.model.match(it.images, it.strings["captions"], first_token=convention, batch_size=batch_size)
    logits = it.record[f"output.itm_logits_{convention}"].astype(np.float64)
    shares = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    assert [match.first_token for match in matches] == [convention] * 3
    assert [match.probability for match in matches] == pytest.approx(shares.tolist(), abs=1e-4)
    assert [match.match_logit for match in matches] == pytest.approx(logits[:, 1].tolist(), abs=1e-4)
    expected = it.record["output.itc_sim"].diagonal().tolist()
    assert [match.cosine for match in matches] == pytest.approx(expected, abs=1e-4)
    assert matches[0].retrieval_score == matches[0].match_logit + matches[0].cosine


def test_the_encoder_pair_is_the_originals(recorded: Callable[[str], Any], assert_same: Callable[..., None]) -> None:
    it = recorded("retrieval")
    images, texts = it.model.encode_image(it.images), it.model.encode_text(it.strings["captions"])
    assert_same(images, it.record["output.image_feat"])
    assert_same(texts, it.record["output.text_feat"])
    assert np.abs(images @ texts.T - it.record["output.itc_sim"]).max() <= 1e-4


def test_one_image_or_one_text_serves_all(recorded: Callable[[str], Any]) -> None:
    it = recorded("retrieval")
    captions = it.strings["captions"]
    grid = [[it.model.match(image, text)[0].match_logit for text in captions] for image in it.images]
    for i in range(3):
        row = [match.match_logit for match in it.model.match(it.images[i], captions, batch_size=2)]
        assert row == pytest.approx(grid[i], abs=1e-5)
        column = [match.match_logit for match in it.model.match(it.images, captions[i], batch_size=2)]
        assert column == pytest.approx([line[i] for line in grid], abs=1e-5)
    assert it.model.match([], captions[:1]) == []
    assert it.model.match(it.images[0], []) == []
    with pytest.raises(UsageError, match="do not pair up"):
        it.model.match(it.images, captions[:2])


def test_the_bundle_names_its_own_convention(blip_model: Callable[[str], Model], image: Image.Image) -> None:
    model = blip_model("retrieval")
    assert model.match(image, "red")[0].first_token == "enc"
    wrong: Any = "dec"
    with pytest.raises(UsageError, match="unknown first token"):
        model.match(image, "red", first_token=wrong)


def test_texts_are_cleaned_where_the_originals_datasets_are(
    blip_model: Callable[[str], Model], image: Image.Image
) -> None:
    model = blip_model("retrieval")
    texts = ["The cat (on) the table!", "the cat on the table"]
    left, right = model.match(image, texts)
    assert left.text == right.text == "the cat on the table"
    assert left.match_logit == pytest.approx(right.match_logit, abs=1e-5)
    left, right = model.match(image, texts, first_token="cls")
    assert left.text == texts[0]
    assert abs(left.match_logit - right.match_logit) > 1e-3
    assert model.match(image, texts[0], first_token="cls", clean=True)[0].text == texts[1]
    assert model.match(image, texts[0], clean=False)[0].text == texts[0]


@pytest.mark.parametrize("text", ["", "...", "[SEP]", "[CLS] [SEP] [PAD]", "[ENC][DEC]", "\n"])
def test_odd_texts_have_results(blip_model: Callable[[str], Model], image: Image.Image, text: str) -> None:
    model = blip_model("retrieval")
    for clean in (True, False):
        # In a batch with a longer text as alone.
        alone = model.match(image, text, clean=clean)[0]
        both = model.match(image, [text, "the cat is on the table"], clean=clean)[0]
        assert np.isfinite([alone.probability, alone.cosine]).all()
        assert both.match_logit == pytest.approx(alone.match_logit, abs=1e-5)
        assert both.cosine == pytest.approx(alone.cosine, abs=1e-5)


def test_over_long_texts_are_refused_or_cut(blip_model: Callable[[str], Model], image: Image.Image) -> None:
    model = blip_model("retrieval")
    with pytest.raises(InputError, match="too long for the model") as caught:
        model.match(image, LONG)
    assert "at most 35 tokens" in caught.value.expected
    assert caught.value.fix
    cut, words = model.match(image, LONG, truncate=True)[0], " ".join(LONG.split()[:33])
    assert cut.match_logit == pytest.approx(model.match(image, words)[0].match_logit, abs=1e-5)


def test_an_image_of_one_pixel_has_results(blip_model: Callable[[str], Model]) -> None:
    pixel, plain = Image.new("RGB", (1, 1), "red"), Image.new("RGB", (64, 64), "red")
    assert blip_model("retrieval").match(pixel, "red") == blip_model("retrieval").match(plain, "red")
