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
from vlm_export.runtime.search.index import SearchIndex
from vlm_export.runtime.search.rerank import search_reranked
from vlm_export.runtime.search.store import Embeddings, EmbeddingsMeta

pytestmark = pytest.mark.needs_torch

TEXTS = ["the cat", "a man in the street", "two dogs are running", "red", "the table with an image"]


@pytest.fixture(scope="module")
def model(blip_bundle: Callable[[str], Path]) -> Model:
    return load(blip_bundle("retrieval"), threads=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for number in range(6):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
        paths.append(str(path))
    return paths


def embedded(model: Model, kind: Any, items: list[str]) -> SearchIndex:
    vectors = model.encode_image([Path(item) for item in items]) if kind == "image" else model.encode_text(items)
    return SearchIndex.of(Embeddings(tuple(items), vectors, EmbeddingsMeta(kind, "tiny", model.identity)))


def test_images_for_a_text(model: Model, images: list[str]) -> None:
    embeddings, query = embedded(model, "image", images), "The cat is on the table."
    matches = model.match([Path(item) for item in images], "the cat is on the table", first_token="enc")
    nearest = sorted(range(6), key=lambda i: -matches[i].cosine)[:4]
    expected = sorted(nearest, key=lambda i: -(matches[i].match_logit + matches[i].cosine))[:3]
    found = search_reranked(model, embeddings, query, 3, is_image=False, candidates=4)
    assert [result.item for result in found] == [images[i] for i in expected]
    scores = [matches[i].match_logit + matches[i].cosine for i in expected]
    assert [result.score for result in found] == pytest.approx(scores, abs=1e-5)
    # The second stage changes the order, otherwise this shows nothing.
    assert expected != nearest[:3]


def test_the_first_stage_sees_the_query_as_the_second_does(model: Model, images: list[str]) -> None:
    embeddings = embedded(model, "image", images)
    raw, cleaned = (embeddings.search(model.encode_text([text])[0], 1)[0].item for text in ("Two dogs!!!", "two dogs"))
    assert raw != cleaned
    (found,) = search_reranked(model, embeddings, "Two dogs!!!", 1, is_image=False, candidates=1)
    assert found.item == cleaned


def test_texts_for_a_image(model: Model, images: list[str]) -> None:
    matches = model.match(Path(images[0]), TEXTS, first_token="enc")
    expected = sorted(range(5), key=lambda i: -matches[i].retrieval_score)
    found = search_reranked(model, embedded(model, "text", TEXTS), images[0], 5, is_image=True)
    assert [result.item for result in found] == [TEXTS[i] for i in expected]
    assert [result.match.text for result in found] == [TEXTS[i] for i in expected]


def test_no_items_give_no_results(model: Model) -> None:
    empty = Embeddings((), np.zeros((0, 32), np.float32), EmbeddingsMeta("image", "tiny", model.identity))
    assert search_reranked(model, SearchIndex.of(empty), "red", 5, is_image=False) == []


def test_a_match_needs_a_image_and_a_text(model: Model, images: list[str]) -> None:
    with pytest.raises(UsageError, match="an image and a text"):
        search_reranked(model, embedded(model, "image", images), images[0], 2, is_image=True)
    with pytest.raises(UsageError, match="an image and a text"):
        search_reranked(model, embedded(model, "text", TEXTS), "red", 2, is_image=False)
    with pytest.raises(UsageError, match="fewer candidates"):
        search_reranked(model, embedded(model, "text", TEXTS), images[0], 3, is_image=True, candidates=2)


def test_an_item_that_is_gone_is_named(model: Model, images: list[str], tmp_path: Path) -> None:
    names = (*images[:5], str(tmp_path / "gone.png"))
    vectors = model.encode_image([Path(item) for item in images])
    gone = SearchIndex.of(Embeddings(names, vectors, EmbeddingsMeta("image", "tiny", model.identity)))
    with pytest.raises(InputError, match="cannot be read") as caught:
        search_reranked(model, gone, "red", 1, is_image=False)
    assert "gone.png" in caught.value.where
