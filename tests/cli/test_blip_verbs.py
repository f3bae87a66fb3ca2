"""The verbs of images and sentences: what they print, what they pass on, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_export import load

pytestmark = pytest.mark.needs_torch

Cli = Callable[..., Any]
Bundle = Callable[[str], Path]
IMAGES = [Path(__file__).parents[1] / "data" / "blip" / variant / "image.png" for variant in ("caption", "vqa")]
ONE = ("--threads", "1")


def test_caption(cli: Cli, blip_bundle: Bundle) -> None:
    bundle = blip_bundle("caption")
    model = load(bundle, threads=1)
    expected = model.caption(IMAGES)
    alone = cli("caption", bundle, IMAGES[0], *ONE)
    assert (alone.status, alone.out.strip(), alone.err) == (0, expected[0], "")
    table = cli("caption", bundle, *IMAGES, "--quiet", *ONE)
    assert (table.status, table.err) == (0, "")
    for line, image_path, caption in zip(table.out.splitlines()[1:], IMAGES, expected, strict=True):
        assert line.split(maxsplit=1) == [str(image_path), caption]
    found = cli("caption", bundle, *IMAGES, "--json", *ONE)
    assert found.data["captions"] == [
        {"image": str(image_path), "caption": caption} for image_path, caption in zip(IMAGES, expected, strict=True)
    ]
    assert "image/s" in found.err


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--greedy"], {"beams": 1}),
        (["--beams", "2", "--max-length", "9"], {"beams": 2, "max_length": 9}),
        (["--prompt", "the cat", "--min-length", "12"], {"prompt": "the cat", "min_length": 12}),
        (["--sample", "--seed", "3", "--top-p", "0.5"], {"sample": True, "seed": 3, "top_p": 0.5}),
        (["--greedy", "--repetition-penalty", "5"], {"beams": 1, "repetition_penalty": 5.0}),
    ],
)
def test_caption_options(cli: Cli, blip_bundle: Bundle, options: list[str], arguments: dict[str, Any]) -> None:
    bundle = blip_bundle("caption")
    expected = load(bundle, threads=1).caption(IMAGES[1], **arguments)
    assert cli("caption", bundle, IMAGES[1], *options, *ONE).out.strip() == expected[0]


def test_caption_refuses(cli: Cli, blip_bundle: Bundle, refused_json: Callable[..., dict[str, Any]]) -> None:
    bundle = blip_bundle("caption")
    cli("caption", bundle, IMAGES[0], "--seed", "1").refused(2, "--sample")
    cli("caption", bundle, IMAGES[0], "--sample", "--top-p", "2").refused(2, "top_p")
    cli("caption", bundle, IMAGES[0], "--max-length", "3").refused(2, "no room after the prompt")
    cli("caption", bundle, "nowhere.png").refused(3, "nowhere.png")
    cli("caption", blip_bundle("vqa"), IMAGES[0]).refused(3, "cannot caption", "trained for captions")
    assert "captions" in refused_json(3, "caption", blip_bundle("retrieval"), IMAGES[0])["fix"]
    assert cli("caption", bundle, IMAGES[0], "--greedy", "--sample").status == 2


def test_verbs_on_a_bundle_of_clip(cli: Cli, pair: Path) -> None:
    for arguments in (
        ["caption", pair, IMAGES[0]],
        ["ask", pair, IMAGES[0], "what"],
    ):
        cli(*arguments).refused(3, "this bundle cannot", "it can embed images or texts")
    cli("match", pair, IMAGES[0], "a", "--first-token", "enc").refused(2, "no use for --first-token", "task match")
    texts = ["a", "a cat"]
    cosines = load(pair).encode_text(texts) @ load(pair).encode_image(IMAGES[0])[0]
    data = cli("match", pair, IMAGES[0], *texts, "--json", *ONE).data
    assert {entry["text"]: entry["cosine"] for entry in data["matches"]} == {
        text: pytest.approx(float(cosine), abs=1e-5) for text, cosine in zip(texts, cosines, strict=True)
    }
    assert len(cli("match", pair, IMAGES[0], *texts, *ONE).out.splitlines()) == 3


def test_ask(cli: Cli, blip_bundle: Bundle) -> None:
    bundle, question = blip_bundle("vqa"), "what color is the cat?"
    model = load(bundle, threads=1)
    (expected,) = model.answer(IMAGES[1], question)
    assert cli("ask", bundle, IMAGES[1], question, *ONE).out.strip() == expected
    data = cli("ask", bundle, IMAGES[1], question, "--json", *ONE).data
    assert data == {"image": str(IMAGES[1]), "question": question, "answer": expected}
    (short,) = model.answer(IMAGES[1], question, beams=1, max_length=4, min_length=3)
    options = ("--beams", "1", "--max-length", "4", "--min-length", "3")
    assert cli("ask", bundle, IMAGES[1], question, *options, *ONE).out.strip() == short


def test_ask_with_candidates(cli: Cli, blip_bundle: Bundle) -> None:
    bundle, question, candidates = blip_bundle("vqa"), "what color is the cat?", ["red", "blue dog", "no"]
    (expected,) = load(bundle, threads=1).rank_answers(IMAGES[1], question, candidates)
    data = cli("ask", bundle, IMAGES[1], question, "--candidates", *candidates, "--json", *ONE).data
    assert data["answer"] == expected[0].text
    assert [(entry["answer"], entry["score"]) for entry in data["candidates"]] == [
        (answer.text, pytest.approx(answer.score, abs=1e-5)) for answer in expected
    ]
    table = cli("ask", bundle, IMAGES[1], question, "--candidates", *candidates, "--rank-k", "2", *ONE)
    assert len(table.out.splitlines()) == 3


def test_ask_refuses(cli: Cli, blip_bundle: Bundle) -> None:
    bundle = blip_bundle("vqa")
    cli("ask", bundle, IMAGES[0], "cat " * 40).refused(3, "too long for the model", "at most 35 tokens")
    assert cli("ask", bundle, IMAGES[0], "cat " * 40, "--truncate", *ONE).status == 0
    cli("ask", bundle, IMAGES[0], "what", "--rank-k", "3").refused(2, "--candidates")
    cli("ask", bundle, IMAGES[0], "what", "--candidates", "a", "--beams", "2").refused(2, "ranked, not written")
    cli("ask", blip_bundle("caption"), IMAGES[0], "what").refused(3, "cannot answer", "trained for questions")


def test_match(cli: Cli, blip_bundle: Bundle) -> None:
    bundle, texts = blip_bundle("retrieval"), ["red", "The cat.", "two dogs"]
    model = load(bundle, threads=1)
    conventions: tuple[tuple[tuple[str, ...], Any], ...] = (((), "enc"), (("--first-token", "cls"), "cls"))
    for options, convention in conventions:
        expected: Any = dict(zip(texts, model.match(IMAGES[0], texts, first_token=convention), strict=True))
        data = cli("match", bundle, IMAGES[0], *texts, *options, "--json", *ONE).data
        assert data["first_token"] == convention
        shares = [entry["probability"] for entry in data["matches"]]
        assert shares == sorted(shares, reverse=True)
        for entry in data["matches"]:
            match = expected[entry["text"]]
            assert entry["probability"] == pytest.approx(match.probability, abs=1e-5)
            assert entry["match_logit"] == pytest.approx(match.match_logit, abs=1e-5)
            assert entry["cosine"] == pytest.approx(match.cosine, abs=1e-5)
    assert len(cli("match", bundle, IMAGES[0], *texts, *ONE).out.splitlines()) == 4
    cli("match", bundle, IMAGES[0], "cat " * 40).refused(3, "too long for the model")
    assert cli("match", bundle, IMAGES[0], "cat " * 40, "--truncate", *ONE).status == 0
    cli("match", blip_bundle("caption"), IMAGES[0], "red").refused(3, "cannot match", "a checkpoint for retrieval")


def test_search_in_two_stages(cli: Cli, blip_bundle: Bundle, tmp_path: Path) -> None:
    bundle, output = blip_bundle("retrieval"), tmp_path / "images.npy"
    assert cli("embed", bundle, *IMAGES, "-o", output, "--quiet", *ONE).status == 0
    model = load(bundle, threads=1)
    matches = dict(zip(map(str, IMAGES), model.match(IMAGES, "the cat"), strict=True))
    data = cli("search", bundle, output, "The cat.", "--rerank", "--json", *ONE).data
    assert data["query_kind"] == "text"
    scores = [entry["score"] for entry in data["matches"]]
    assert scores == sorted(scores, reverse=True)
    assert {entry["item"] for entry in data["matches"]} == set(matches)
    for entry in data["matches"]:
        assert entry["score"] == pytest.approx(matches[entry["item"]].retrieval_score, abs=1e-5)
        assert entry["probability"] == pytest.approx(matches[entry["item"]].probability, abs=1e-5)
    assert len(cli("search", bundle, output, "the cat", "--rerank", "-k", "1", *ONE).out.splitlines()) == 2
    cli("search", bundle, output, IMAGES[0], "--rerank").refused(2, "an image and a text")
    cli("search", bundle, output, "the cat", "--candidates", "3").refused(2, "--rerank")
    cli("search", bundle, output, "the cat", "--rerank", "-k", "3", "--candidates", "2").refused(2, "fewer candidates")


def test_search_in_two_stages_needs_a_model_that_matches(cli: Cli, pair: Path, tmp_path: Path) -> None:
    output = tmp_path / "images.npy"
    assert cli("embed", pair, *IMAGES, "-o", output, "--quiet", *ONE).status == 0
    cli("search", pair, output, "red", "--rerank").refused(3, "this bundle cannot match")
