"""Answers of exported bundles: the original's recorded token ids, batches against single rows, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm_export
from vlm_export import VisionChat, load, load_vision_chat, load_vision_language
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation import embedding_decoder as embedded_decoder
from vlm_export.runtime.inputs.images import PictureSource
from vlm_export.runtime.tasks import chat_rows as chat_inputs
from vlm_export.runtime.tasks.chat import CAPTION_QUESTION

pytestmark = pytest.mark.needs_torch

DATA = Path(__file__).parents[1] / "data"
VARIANTS = ("222m", "450m", "split")
ASKED = "What is this?"
OTHERS = [ASKED, "Where?", "What is the colour of the thing on the left, and is it red?", "Is this a cat?", "é🙂"]
Model = Callable[[str], VisionChat]


def picture(variant: str) -> Path:
    return DATA / "nanovlm" / variant / "image.png"


def other_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((90, 120), (64, 20), (30, 30))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def opened(nanovlm_bundle: Callable[[str], Path]) -> Model:
    """The model of a variant, opened once; tests must not change it."""
    models: dict[str, VisionChat] = {}

    def open_variant(variant: str) -> VisionChat:
        if variant not in models:
            models[variant] = load_vision_chat(nanovlm_bundle(variant), threads=1)
        return models[variant]

    return open_variant


@pytest.fixture
def changed(opened: Model) -> Callable[..., VisionChat]:
    """A model of a variant whose settings differ."""

    def change(variant: str, **settings: Any) -> VisionChat:
        model = opened(variant)
        twin = VisionChat(model.bundle, threads=1)
        for name in ("decoder", "embed_tokens", "vision_encoder"):
            twin.__dict__[name] = getattr(model, name)
        twin.__dict__["chat"] = replace(model.chat, **settings)
        return twin

    return change


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_original_is_repeated(variant: str, opened: Model, nanovlm_record: Callable[[str], Any]) -> None:
    model, record = opened(variant), nanovlm_record(variant)
    ((_, features),) = model.features([picture(variant)])
    assert np.abs(features - record["output.mp_image"].reshape(features.shape)).max() <= 1e-4
    (row,) = model.question_rows([(picture(variant),)], [ASKED])
    assert row.ids == record["input.input_ids"][0].tolist()
    prompts = model.prompts([row])
    assert np.abs(prompts.inputs_embeds - record["output.combined_embeds"]).max() <= 1e-4
    assert prompts.attention_mask.all()
    expected = record["output.generated_ids_greedy"][0].tolist()
    for cached in (True, False):
        (got,) = model.generate_ids([picture(variant)], [row.ids], max_new_tokens=12, cached=cached)
        assert got == expected
    (answer,) = model.answer(picture(variant), ASKED, max_new_tokens=12)
    assert answer == model.tokenizer.decode(expected).strip()
    assert "".join(model.stream_answer(picture(variant), ASKED, max_new_tokens=12)) == answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_answer_like_single_questions(variant: str, opened: Model) -> None:
    model = opened(variant)
    images: list[PictureSource] = [picture(variant), *other_pictures(), picture(variant).read_bytes()]
    alone = [model.answer(image, question)[0] for image, question in zip(images, OTHERS, strict=True)]
    assert len(set(alone)) > 2
    for size in (1, 2, 5):
        assert model.answer(images, OTHERS, batch_size=size) == alone
    shared = [model.answer(images[0], question)[0] for question in OTHERS]
    assert model.answer(images[0], OTHERS, batch_size=2) == shared
    assert model.answer(images, ASKED) == [model.answer(image, ASKED)[0] for image in images]


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_in_pieces_answer_like_whole_ones(variant: str, opened: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(variant)
    images: list[PictureSource] = [picture(variant), *other_pictures(), picture(variant).read_bytes()]
    whole = model.answer(images, OTHERS)
    monkeypatch.setattr(embedded_decoder, "_PIECE_TOKENS", 5)
    assert model.answer(images, OTHERS) == whole


@pytest.mark.parametrize("variant", ["450m", "split"])
def test_several_pictures_and_none(variant: str, opened: Model) -> None:
    model, (first, second, third) = opened(variant), other_pictures()
    entries: list[Any] = [[first, second], third, None, [first, second, third], []]
    rows = [model.answer([entry], question)[0] for entry, question in zip(entries, OTHERS, strict=True)]
    assert model.answer(entries, OTHERS) == rows
    assert rows[0] != model.answer([[second, first]], OTHERS[0])[0]
    prompts = [row.ids for row in model.question_rows([chat_inputs.picture_tuple(entry) for entry in entries], OTHERS)]
    assert len({len(ids) for ids in prompts}) > 2
    assert model.generate_ids(entries, prompts) == model.generate_ids(entries, prompts, cached=False)
    assert "".join(model.stream_answer([first, second], OTHERS[0])) == rows[0]
    assert "".join(model.stream_answer(None, OTHERS[2])) == rows[2]


def test_one_picture_is_encoded_once_for_all_questions(opened: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("split")
    runs: list[int] = []
    run = model.vision_encoder.run

    def counted(feeds: Mapping[str, Any]) -> dict[str, Any]:
        runs.append(len(feeds["pixel_values"]))
        return run(feeds)

    monkeypatch.setattr(model.vision_encoder, "run", counted)
    model.answer(picture("split"), OTHERS, batch_size=2, max_new_tokens=1)
    assert runs == [4, 1]


def test_the_end_token_ends_an_answer(opened: Model, changed: Callable[..., VisionChat]) -> None:
    model = opened("split")
    (row,) = model.question_rows([(picture("split"),)], [ASKED])
    (ids,) = model.generate_ids([picture("split")], [row.ids], max_new_tokens=12)
    ending = changed("split", eos_token_ids=(ids[4],))
    assert ending.generate_ids([picture("split")], [row.ids], max_new_tokens=12) == [ids[:5]]
    assert ending.generate_ids([picture("split")], [row.ids], max_new_tokens=12, stop_at_end=False) == [ids]
    assert ending.answer(picture("split"), ASKED, stop_at_end=False, max_new_tokens=12) == model.answer(
        picture("split"), ASKED, max_new_tokens=12
    )


def test_lengths_and_defaults(opened: Model, changed: Callable[..., VisionChat]) -> None:
    model = opened("450m")
    (row,) = model.question_rows([(picture("450m"),)], [ASKED])
    (ids,) = model.generate_ids([picture("450m")], [row.ids], stop_at_end=False)
    assert len(ids) == model.chat.max_new_tokens
    assert model.generate_ids([picture("450m")], [row.ids], max_new_tokens=3) == [ids[:3]]
    assert model.caption(picture("450m")) == model.answer(picture("450m"), CAPTION_QUESTION)
    assert model.caption([picture("450m")] * 2, prompt="Where?") == model.answer(picture("450m"), ["Where?"] * 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_context_ends_an_answer(variant: str, opened: Model, changed: Callable[..., VisionChat]) -> None:
    model, image = opened(variant), picture(variant)
    rows = model.question_rows([(image,)] * 2, [ASKED, "Where?"])
    prompts, longest = [row.ids for row in rows], max(row.length for row in rows)
    expected = model.generate_ids([image] * 2, prompts, max_new_tokens=9, stop_at_end=False)
    for room in (0, 3):
        near = changed(variant, context_length=longest + room)
        found = near.generate_ids([image] * 2, prompts, max_new_tokens=9, stop_at_end=False)
        lengths = [min(9, longest + room - row.length + 1) for row in rows]
        assert found == [ids[:length] for ids, length in zip(expected, lengths, strict=True)]
    with pytest.raises(InputError, match="longer than the model's context"):
        changed(variant, context_length=longest - 1).answer(image, ASKED)


def test_truncation(changed: Callable[..., VisionChat]) -> None:
    model = changed("split", context_length=60)
    long = "what is this thing " * 30
    with pytest.raises(InputError, match="longer than the model's context") as caught:
        model.answer(picture("split"), [ASKED, long])
    assert caught.value.where == "question 1"
    assert len(model.answer(picture("split"), [ASKED, long], truncate=True)) == 2
    (row,) = model.question_rows([(picture("split"),)], [long], truncate=True)
    assert row.length <= 60
    assert sum(token == model.chat.image_token_id for token in row.ids) == 20


def test_sampling(opened: Model) -> None:
    model, image = opened("450m"), picture("450m")
    (row,) = model.question_rows([(image,)], [ASKED])

    def drawn(prompts: int = 1, **options: Any) -> list[list[int]]:
        return model.generate_ids([image] * prompts, [row.ids] * prompts, sample=True, stop_at_end=False, **options)

    batch = drawn(3, seed=5)
    assert batch == drawn(3, seed=5)
    assert len({tuple(ids) for ids in batch}) == 3
    assert drawn(seed=5) == batch[:1]
    assert drawn(seed=6) != batch[:1]
    settings = model.chat.sampling
    stated: dict[str, Any] = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    assert drawn(seed=5, **stated) == batch[:1]
    assert drawn(seed=5, temperature=3.0, top_k=0, top_p=1.0) != batch[:1]
    greedy = model.generate_ids([image], [row.ids], stop_at_end=False)
    assert drawn(seed=5, top_k=1) == drawn(seed=7, temperature=1e-3) == greedy
    text = model.answer([image] * 3, ASKED, sample=True, seed=5, stop_at_end=False, batch_size=2)
    assert text == [model.tokenizer.decode(ids).strip() for ids in batch]
    (alone, *_) = text
    assert "".join(model.stream_answer(image, ASKED, sample=True, seed=5, stop_at_end=False)) == alone


def test_options_are_checked(opened: Model) -> None:
    model, image = opened("450m"), picture("450m")
    for options in ({"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}):
        with pytest.raises(UsageError, match=next(iter(options))):
            model.answer(image, ASKED, **options)
    for name, value in (("max_new_tokens", 0), ("seed", -1), ("top_p", 2.0), ("top_k", -1), ("temperature", 0.0)):
        given: dict[str, Any] = {"sample": True, name: value}
        with pytest.raises(UsageError, match=name):
            model.stream_answer(image, ASKED, **given)
    with pytest.raises(UsageError, match="batch_size"):
        model.answer(image, ASKED, batch_size=0)


def test_ids_need_no_tokenizer(opened: Model, nanovlm_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    (row,) = opened("450m").question_rows([(picture("450m"),)], [ASKED])
    folder = changed_bundle(nanovlm_bundle("450m"), tmp_path, lambda m: m["files"].pop("tokenizer.json"))
    bare = load_vision_chat(folder, threads=1)
    expected = opened("450m").generate_ids([picture("450m")], [row.ids])
    assert bare.generate_ids([picture("450m")], [row.ids]) == expected
    with pytest.raises(InputError, match="no tokenizer") as caught:
        bare.encode_text("a")
    assert "generate_ids" in caught.value.fix


def test_numbers_have_to_pair_up(opened: Model) -> None:
    model, image = opened("450m"), picture("450m")
    with pytest.raises(UsageError, match="do not pair up") as caught:
        model.answer([image, image], [ASKED] * 3)
    assert caught.value.got == "2 entries of pictures and 3 questions"
    with pytest.raises(UsageError, match="do not pair up"):
        model.generate_ids([image], [[1], [2]])
    assert model.answer([], []) == []
    assert model.caption([]) == []


def test_pictures_and_places_have_to_match(opened: Model) -> None:
    image = picture("450m")
    for images in ([[image, image]], [None]):
        with pytest.raises(UsageError, match="exactly one picture"):
            opened("222m").answer(images, ASKED)
    model = opened("450m")
    with pytest.raises(InputError, match="placeholders do not match"):
        model.answer(image, "Is <|image|> red?")
    (row,) = model.question_rows([(image,)], [ASKED])
    with pytest.raises(InputError, match="placeholders do not match") as caught:
        model.generate_ids([image, [image, image]], [row.ids, row.ids])
    assert caught.value.where == "prompt 1"
    for ids in ([], [-1], [321]):
        with pytest.raises(InputError, match="token ids do not fit"):
            model.generate_ids([None], [ids])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_pictures_are_named(variant: str, opened: Model, tmp_path: Path) -> None:
    model, broken = opened(variant), tmp_path / "broken.png"
    broken.write_bytes(picture(variant).read_bytes()[:500])
    with pytest.raises(InputError) as caught:
        model.answer([picture(variant), broken], ASKED)
    assert caught.value.where == str(broken)
    with pytest.raises(InputError, match="cannot be read"):
        model.stream_answer(tmp_path / "missing.png", ASKED)
    with pytest.raises(InputError) as caught:
        model.answer([picture(variant), b"no picture"], ASKED)
    assert caught.value.where == "picture 1"
    with pytest.raises(InputError, match="too long and thin"):
        model.answer(Image.new("L", (1, 4_000_000)), ASKED)


def test_streams_check_before_they_run(opened: Model) -> None:
    words = opened("450m").stream_answer(picture("450m"), ASKED, max_new_tokens=12)
    first = next(words)
    assert first
    assert "\ufffd" not in first
    assert first + "".join(words) == opened("450m").answer(picture("450m"), ASKED, max_new_tokens=12)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cosines(variant: str, opened: Model) -> None:
    model = opened(variant)
    images: list[PictureSource] = [picture(variant), *other_pictures()]
    ((_, features),) = model.features([images[0]])
    mean = features.reshape(-1, features.shape[-1]).mean(axis=0)
    rows = model.encode_image(images, batch_size=3)
    assert rows.shape == (4, model.embed_dim)
    assert np.allclose(rows[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    words = model.encode_text(["a cat", "what"])
    mean = model.embedded(model.tokenizer.prompt_ids("a cat")).mean(axis=0)
    assert np.allclose(words[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(model.similarity(images, ["a cat", "what"]), rows @ words.T, atol=1e-6)
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, model.embed_dim)
    with pytest.raises(InputError, match="empty text"):
        model.encode_text(["a", ""])
    with pytest.raises(InputError, match="not trained to compare"):
        model.classify(images, ["cat", "dog"])


def test_loaders(nanovlm_bundle: Callable[[str], Path]) -> None:
    folder = nanovlm_bundle("222m")
    assert isinstance(load(folder), VisionChat)
    assert vlm_export.load_vision_chat is load_vision_chat
    with pytest.raises(InputError, match="decoder-only") as caught:
        load_vision_language(folder)
    assert "load_vision_chat" in caught.value.fix
    with pytest.raises(InputError, match="no model to talk with"):
        load_vision_chat(DATA / "runtime" / "tiny_bundle")


def test_it_travels_to_workers(nanovlm_bundle: Callable[[str], Path]) -> None:
    model = load(nanovlm_bundle("222m"), threads=1)
    expected = model.encode_text(["a cat"])
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is VisionChat
    assert (again.encode_text(["a cat"]) == expected).all()


def changed_bundle(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    target = Path(shutil.copytree(source, folder / "changed"))
    manifest = json.loads((target / "vlm_export.json").read_text(encoding="utf-8"))
    change(manifest)
    (target / "vlm_export.json").write_text(json.dumps(manifest), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("450m", lambda m: m["tasks"][0].pop("layout"), "missing fields"),
        ("450m", lambda m: m["tasks"][0].update(tokens_per_tile=5), "another number of features"),
        ("450m", lambda m: m["tasks"][0].update(image_token_id=7), "lacks tokens"),
        ("450m", lambda m: m.update(image=None), "preparation of images"),
        ("450m", lambda m: m["files"].pop("tokenizer.json"), "no tokenizer"),
        ("split", lambda m: m.update(image=None), "preparation of images"),
        ("split", lambda m: m["image"].update(max_side_pixels=65), "max_side_pixels"),
    ],
)
def test_manifests_that_contradict_themselves(
    variant: str,
    change: Callable[[dict[str, Any]], object],
    message: str,
    nanovlm_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = changed_bundle(nanovlm_bundle(variant), tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_vision_chat(folder, threads=1).answer(picture(variant), ASKED)


def test_the_identity_knows_the_tiles(nanovlm_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    source = nanovlm_bundle("split")
    other = changed_bundle(source, tmp_path, lambda m: m["image"].update(resize_to_max_side=False))
    assert load(source).identity != load(other).identity


def test_a_decoder_that_breaks_is_named(opened: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("222m")
    outputs = {port.name: np.zeros((1, 2, 13, 12), np.float32) for port in model.decoder.outputs}
    monkeypatch.setattr(model.decoder, "run", lambda feeds: {**outputs, "logits": np.full((1, 13, 320), np.nan)})
    with pytest.raises(InputError, match="not finite"):
        model.answer(picture("222m"), ASKED)
