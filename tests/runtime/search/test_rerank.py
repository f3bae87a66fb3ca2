"""Two-stage retrieval: candidates by cosine, their order by the logit of a match plus the cosine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.search.rerank import search_reranked
from vlm_export.runtime.search.store import Embeddings, EmbeddingsMeta

pytestmark = pytest.mark.needs_torch

TEXTS = ["the cat", "a man in the street", "two dogs are running", "red", "the table with a picture"]


@pytest.fixture(scope="module")
def model(blip_bundle: Callable[[str], Path]) -> Model:
    return load(blip_bundle("retrieval"), threads=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for number in range(6):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
        paths.append(str(path))
    return paths


def embedded(model: Model, kind: Any, items: list[str]) -> Embeddings:
    vectors = model.encode_image([Path(item) for item in items]) if kind == "image" else model.encode_text(items)
    return Embeddings(tuple(items), vectors, EmbeddingsMeta(kind, "tiny", model.identity))


def test_pictures_for_a_text(model: Model, pictures: list[str]) -> None:
    embeddings, query = embedded(model, "image", pictures), "The cat is on the table."
    matches = model.match([Path(item) for item in pictures], "the cat is on the table", first_token="enc")
    nearest = sorted(range(6), key=lambda i: -matches[i].cosine)[:4]
    expected = sorted(nearest, key=lambda i: -(matches[i].match_logit + matches[i].cosine))[:3]
    found = search_reranked(model, embeddings, query, 3, is_picture=False, candidates=4)
    assert [result.item for result in found] == [pictures[i] for i in expected]
    scores = [matches[i].match_logit + matches[i].cosine for i in expected]
    assert [result.score for result in found] == pytest.approx(scores, abs=1e-5)
    # The second stage changes the order, otherwise this shows nothing.
    assert expected != nearest[:3]


def test_the_first_stage_sees_the_query_as_the_second_does(model: Model, pictures: list[str]) -> None:
    embeddings = embedded(model, "image", pictures)
    raw, cleaned = (embeddings.vectors @ model.encode_text([text])[0] for text in ("Two dogs!!!", "two dogs"))
    assert raw.argmax() != cleaned.argmax()
    (found,) = search_reranked(model, embeddings, "Two dogs!!!", 1, is_picture=False, candidates=1)
    assert found.item == pictures[int(cleaned.argmax())]


def test_texts_for_a_picture(model: Model, pictures: list[str]) -> None:
    matches = model.match(Path(pictures[0]), TEXTS, first_token="enc")
    expected = sorted(range(5), key=lambda i: -matches[i].retrieval_score)
    found = search_reranked(model, embedded(model, "text", TEXTS), pictures[0], 5, is_picture=True)
    assert [result.item for result in found] == [TEXTS[i] for i in expected]
    assert [result.match.text for result in found] == [TEXTS[i] for i in expected]


def test_no_items_give_no_results(model: Model) -> None:
    empty = Embeddings((), np.zeros((0, 32), np.float32), EmbeddingsMeta("image", "tiny", model.identity))
    assert search_reranked(model, empty, "red", 5, is_picture=False) == []


def test_a_match_needs_a_picture_and_a_text(model: Model, pictures: list[str]) -> None:
    with pytest.raises(UsageError, match="a picture and a text"):
        search_reranked(model, embedded(model, "image", pictures), pictures[0], 2, is_picture=True)
    with pytest.raises(UsageError, match="a picture and a text"):
        search_reranked(model, embedded(model, "text", TEXTS), "red", 2, is_picture=False)
    with pytest.raises(UsageError, match="fewer candidates"):
        search_reranked(model, embedded(model, "text", TEXTS), pictures[0], 3, is_picture=True, candidates=2)


def test_an_item_that_is_gone_is_named(model: Model, pictures: list[str], tmp_path: Path) -> None:
    embeddings = embedded(model, "image", pictures)
    gone = Embeddings((*pictures[:5], str(tmp_path / "gone.png")), embeddings.vectors, embeddings.meta)
    with pytest.raises(InputError, match="cannot be read") as caught:
        search_reranked(model, gone, "red", 1, is_picture=False)
    assert "gone.png" in caught.value.where
