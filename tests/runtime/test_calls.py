"""Calls of bundles that talk and match: how errors name things, which numbers are taken, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export import VisionChat, load, load_vision_chat
from vlm_export.errors import InputError, UsageError

pytestmark = pytest.mark.needs_torch

PICTURE = Path(__file__).parents[1] / "data" / "nanovlm" / "split" / "image.png"
ASKED = "What is this?"
OTHERS = [ASKED, "Where?", "What is the colour of the thing on the left, and is it red?", "Is this a cat?", "é🙂"]


@pytest.fixture(scope="module")
def chat(nanovlm_bundle: Callable[[str], Path]) -> VisionChat:
    return load_vision_chat(nanovlm_bundle("split"), threads=2)


def test_errors_count_over_all_batches(chat: VisionChat) -> None:
    model, good = chat, PICTURE.read_bytes()
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        model.answer([good] * 5 + [b"bad"], ASKED, max_new_tokens=1)
    assert caught.value.where == "picture 5"
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        model.answer([None, [good, good], good, None, [good, b"bad"]], ASKED, max_new_tokens=1)
    assert caught.value.where == "picture 4"
    with pytest.raises(InputError, match="surrogate") as caught:
        model.answer(good, [ASKED] * 5 + ["\ud800"], max_new_tokens=1)
    assert caught.value.where.startswith("question 5")


def test_a_picture_that_pillow_has_only_opened_serves_several_rows(chat: VisionChat) -> None:
    model = chat
    expected = model.answer([PICTURE] * 3, OTHERS[:3], max_new_tokens=2)
    with Image.open(PICTURE) as image:
        assert model.answer([image] * 3, OTHERS[:3], max_new_tokens=2) == expected


def test_numbers_of_numpy_are_options(chat: VisionChat) -> None:
    model, options = chat, {"top_k": 5, "seed": 3, "max_new_tokens": 4, "temperature": 0.5}
    numbers: dict[str, Any] = {
        name: np.int64(value) if isinstance(value, int) else np.float32(value) for name, value in options.items()
    }
    plain: dict[str, Any] = dict(options)
    assert model.answer(PICTURE, ASKED, sample=True, **numbers) == model.answer(PICTURE, ASKED, sample=True, **plain)


def test_embeddings_of_texts_do_not_depend_on_the_batch(chat: VisionChat) -> None:
    model = chat
    together = model.encode_text(OTHERS, batch_size=64)
    for batch_size in (1, 2):
        assert np.allclose(model.encode_text(OTHERS, batch_size=batch_size), together, atol=1e-6)
    assert np.allclose(model.encode_text(OTHERS[2]), together[2:3], atol=1e-6)
    with pytest.raises(UsageError, match="batch_size"):
        model.encode_text(OTHERS, batch_size=0)
    with pytest.raises(InputError, match="an empty text") as caught:
        model.encode_text(["a", "b", ""])
    assert caught.value.where == "text 2"


def test_what_an_encoder_pair_has_more_is_refused(chat: VisionChat) -> None:
    model = chat
    for name in ("vision", "text", "logit_scale"):
        with pytest.raises(InputError):
            getattr(model, name)
    with pytest.raises(InputError):
        model.encode_ids([[1, 2]])
    with pytest.raises(InputError, match="not trained to compare") as caught:
        model.classify(PICTURE, ["a", "b"])
    assert caught.value.expected == "a bundle of CLIP"


def test_a_model_without_embeddings_has_no_size_of_them(blip_bundle: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="no embeddings"):
        _ = load(blip_bundle("caption"), threads=1).embed_dim
    model = load(blip_bundle("retrieval"), threads=1)
    assert model.encode_image(PICTURE).shape == (1, model.embed_dim)


def test_a_model_without_a_scale_says_what_to_use(blip_bundle: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="no scale for probabilities") as caught:
        load(blip_bundle("retrieval"), threads=1).classify(PICTURE, ["a", "b"])
    assert "match" in caught.value.fix
