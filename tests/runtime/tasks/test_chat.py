"""Answers of exported bundles: the original's recorded token ids, batches against single rows, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation import embedding_decoder
from vlm_export.runtime.inputs.images import ImageSource
from vlm_export.runtime.tasks.chat import CAPTION_QUESTION, ChatTask
from vlm_export.runtime.tasks.chat_rows import image_tuple

pytestmark = pytest.mark.needs_torch

DATA = Path(__file__).parents[2] / "data"
VARIANTS = ("222m", "450m", "split")
ASKED = "What is this?"
OTHERS = [ASKED, "Where?", "What is the colour of the thing on the left, and is it red?", "Is this a cat?", "é🙂"]
Opened = Callable[[str], ChatTask]


def image_path(variant: str) -> Path:
    return DATA / "nanovlm" / variant / "image.png"


def other_images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((90, 120), (64, 20), (30, 30))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def opened(nanovlm_bundle: Callable[[str], Path]) -> Opened:
    """The chat of a variant, opened once; tests must not change it."""
    chats: dict[str, ChatTask] = {}

    def open_variant(variant: str) -> ChatTask:
        if variant not in chats:
            chats[variant] = load(nanovlm_bundle(variant), threads=1).chatting
        return chats[variant]

    return open_variant


@pytest.fixture
def changed(opened: Opened) -> Callable[..., ChatTask]:
    """A variant's chat whose settings differ."""

    def change(variant: str, **settings: Any) -> ChatTask:
        chat = opened(variant)
        return ChatTask(chat.session, replace(chat.spec, **settings))

    return change


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_original_is_repeated(variant: str, opened: Opened, nanovlm_record: Callable[[str], Any]) -> None:
    model, record = opened(variant), nanovlm_record(variant)
    ((_, features),) = model.rows.features([image_path(variant)])
    assert np.abs(features - record["output.mp_image"].reshape(features.shape)).max() <= 1e-4
    (row,) = model.rows.question_rows([(image_path(variant),)], [ASKED])
    assert row.ids == record["input.input_ids"][0].tolist()
    prompts = model.rows.prompts([row])
    assert np.abs(prompts.inputs_embeds - record["output.combined_embeds"]).max() <= 1e-4
    assert prompts.attention_mask.all()
    expected = record["output.generated_ids_greedy"][0].tolist()
    for cached in (True, False):
        (got,) = model.generate_ids([image_path(variant)], [row.ids], max_new_tokens=12, cached=cached)
        assert got == expected
    (answer,) = model.answer(image_path(variant), ASKED, max_new_tokens=12)
    assert answer == model.session.tokenizer.decode(expected).strip()
    assert "".join(model.stream_answer(image_path(variant), ASKED, max_new_tokens=12)) == answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_answer_like_single_questions(variant: str, opened: Opened) -> None:
    model = opened(variant)
    images: list[ImageSource] = [image_path(variant), *other_images(), image_path(variant).read_bytes()]
    alone = [model.answer(image, question)[0] for image, question in zip(images, OTHERS, strict=True)]
    assert len(set(alone)) > 2
    for size in (1, 2, 5):
        assert model.answer(images, OTHERS, batch_size=size) == alone
    shared = [model.answer(images[0], question)[0] for question in OTHERS]
    assert model.answer(images[0], OTHERS, batch_size=2) == shared
    assert model.answer(images, ASKED) == [model.answer(image, ASKED)[0] for image in images]


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_in_pieces_answer_like_whole_ones(
    variant: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(variant)
    images: list[ImageSource] = [image_path(variant), *other_images(), image_path(variant).read_bytes()]
    whole = model.answer(images, OTHERS)
    monkeypatch.setattr(embedding_decoder, "_PIECE_TOKENS", 5)
    assert model.answer(images, OTHERS) == whole


@pytest.mark.parametrize("variant", ["450m", "split"])
def test_several_images_and_none(variant: str, opened: Opened) -> None:
    model, (first, second, third) = opened(variant), other_images()
    entries: list[Any] = [[first, second], third, None, [first, second, third], []]
    rows = [model.answer([entry], question)[0] for entry, question in zip(entries, OTHERS, strict=True)]
    assert model.answer(entries, OTHERS) == rows
    assert rows[0] != model.answer([[second, first]], OTHERS[0])[0]
    prompts = [row.ids for row in model.rows.question_rows([image_tuple(entry) for entry in entries], OTHERS)]
    assert len({len(ids) for ids in prompts}) > 2
    assert model.generate_ids(entries, prompts) == model.generate_ids(entries, prompts, cached=False)
    assert "".join(model.stream_answer([first, second], OTHERS[0])) == rows[0]
    assert "".join(model.stream_answer(None, OTHERS[2])) == rows[2]


def test_one_image_is_encoded_once_for_all_questions(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("split")
    runs: list[int] = []
    vision = model.session.engine("vision_encoder")
    run = vision.run

    def counted(feeds: Mapping[str, Any]) -> dict[str, Any]:
        runs.append(len(feeds["pixel_values"]))
        return run(feeds)

    monkeypatch.setattr(vision, "run", counted)
    model.answer(image_path("split"), OTHERS, batch_size=2, max_new_tokens=1)
    assert runs == [4, 1]


def test_the_end_token_ends_an_answer(opened: Opened, changed: Callable[..., ChatTask]) -> None:
    model = opened("split")
    (row,) = model.rows.question_rows([(image_path("split"),)], [ASKED])
    (ids,) = model.generate_ids([image_path("split")], [row.ids], max_new_tokens=12)
    ending = changed("split", eos_token_ids=(ids[4],))
    assert ending.generate_ids([image_path("split")], [row.ids], max_new_tokens=12) == [ids[:5]]
    assert ending.generate_ids([image_path("split")], [row.ids], max_new_tokens=12, stop_at_end=False) == [ids]
    assert ending.answer(image_path("split"), ASKED, stop_at_end=False, max_new_tokens=12) == model.answer(
        image_path("split"), ASKED, max_new_tokens=12
    )


def test_lengths_and_defaults(opened: Opened, changed: Callable[..., ChatTask]) -> None:
    model = opened("450m")
    (row,) = model.rows.question_rows([(image_path("450m"),)], [ASKED])
    (ids,) = model.generate_ids([image_path("450m")], [row.ids], stop_at_end=False)
    assert len(ids) == model.spec.max_new_tokens
    assert model.generate_ids([image_path("450m")], [row.ids], max_new_tokens=3) == [ids[:3]]
    assert model.caption(image_path("450m")) == model.answer(image_path("450m"), CAPTION_QUESTION)
    assert model.caption([image_path("450m")] * 2, prompt="Where?") == model.answer(image_path("450m"), ["Where?"] * 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_context_ends_an_answer(variant: str, opened: Opened, changed: Callable[..., ChatTask]) -> None:
    model, image = opened(variant), image_path(variant)
    rows = model.rows.question_rows([(image,)] * 2, [ASKED, "Where?"])
    prompts, longest = [row.ids for row in rows], max(row.length for row in rows)
    expected = model.generate_ids([image] * 2, prompts, max_new_tokens=9, stop_at_end=False)
    for room in (0, 3):
        near = changed(variant, context_length=longest + room)
        found = near.generate_ids([image] * 2, prompts, max_new_tokens=9, stop_at_end=False)
        lengths = [min(9, longest + room - row.length + 1) for row in rows]
        assert found == [ids[:length] for ids, length in zip(expected, lengths, strict=True)]
    with pytest.raises(InputError, match="longer than the model's context"):
        changed(variant, context_length=longest - 1).answer(image, ASKED)


def test_truncation(changed: Callable[..., ChatTask]) -> None:
    model = changed("split", context_length=60)
    long = "what is this thing " * 30
    with pytest.raises(InputError, match="longer than the model's context") as caught:
        model.answer(image_path("split"), [ASKED, long])
    assert caught.value.where == "question 1"
    assert len(model.answer(image_path("split"), [ASKED, long], truncate=True)) == 2
    (row,) = model.rows.question_rows([(image_path("split"),)], [long], truncate=True)
    assert row.length <= 60
    assert sum(token == model.spec.image_token_id for token in row.ids) == 20


def test_sampling(opened: Opened) -> None:
    model, image = opened("450m"), image_path("450m")
    (row,) = model.rows.question_rows([(image,)], [ASKED])

    def drawn(prompts: int = 1, **options: Any) -> list[list[int]]:
        return model.generate_ids([image] * prompts, [row.ids] * prompts, sample=True, stop_at_end=False, **options)

    batch = drawn(3, seed=5)
    assert batch == drawn(3, seed=5)
    assert len({tuple(ids) for ids in batch}) == 3
    assert drawn(seed=5) == batch[:1]
    assert drawn(seed=6) != batch[:1]
    settings = model.spec.sampling
    stated: dict[str, Any] = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    assert drawn(seed=5, **stated) == batch[:1]
    assert drawn(seed=5, temperature=3.0, top_k=0, top_p=1.0) != batch[:1]
    greedy = model.generate_ids([image], [row.ids], stop_at_end=False)
    assert drawn(seed=5, top_k=1) == drawn(seed=7, temperature=1e-3) == greedy
    text = model.answer([image] * 3, ASKED, sample=True, seed=5, stop_at_end=False, batch_size=2)
    assert text == [model.session.tokenizer.decode(ids).strip() for ids in batch]
    (alone, *_) = text
    assert "".join(model.stream_answer(image, ASKED, sample=True, seed=5, stop_at_end=False)) == alone


def test_options_are_checked(opened: Opened) -> None:
    model, image = opened("450m"), image_path("450m")
    for options in ({"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}):
        with pytest.raises(UsageError, match=next(iter(options))):
            model.answer(image, ASKED, **options)
    for name, value in (("max_new_tokens", 0), ("seed", -1), ("top_p", 2.0), ("top_k", -1), ("temperature", 0.0)):
        given: dict[str, Any] = {"sample": True, name: value}
        with pytest.raises(UsageError, match=name):
            model.stream_answer(image, ASKED, **given)
    with pytest.raises(UsageError, match="batch_size"):
        model.answer(image, ASKED, batch_size=0)


def test_ids_need_no_tokenizer(opened: Opened, nanovlm_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    (row,) = opened("450m").rows.question_rows([(image_path("450m"),)], [ASKED])
    folder = changed_bundle(nanovlm_bundle("450m"), tmp_path, lambda m: m["files"].pop("tokenizer.json"))
    bare = load(folder, threads=1)
    expected = opened("450m").generate_ids([image_path("450m")], [row.ids])
    assert bare.chatting.generate_ids([image_path("450m")], [row.ids]) == expected
    with pytest.raises(InputError, match="no tokenizer") as caught:
        bare.encode_text("a")
    assert "generate_ids" in caught.value.fix


def test_numbers_have_to_pair_up(opened: Opened) -> None:
    model, image = opened("450m"), image_path("450m")
    with pytest.raises(UsageError, match="do not pair up") as caught:
        model.answer([image, image], [ASKED] * 3)
    assert caught.value.got == "2 entries of images and 3 questions"
    with pytest.raises(UsageError, match="do not pair up"):
        model.generate_ids([image], [[1], [2]])
    assert model.answer([], []) == []
    assert model.caption([]) == []


def test_images_and_places_have_to_match(opened: Opened) -> None:
    image = image_path("450m")
    for images in ([[image, image]], [None]):
        with pytest.raises(UsageError, match="exactly one image"):
            opened("222m").answer(images, ASKED)
    model = opened("450m")
    with pytest.raises(InputError, match="placeholders do not match"):
        model.answer(image, "Is <|image|> red?")
    (row,) = model.rows.question_rows([(image,)], [ASKED])
    with pytest.raises(InputError, match="placeholders do not match") as caught:
        model.generate_ids([image, [image, image]], [row.ids, row.ids])
    assert caught.value.where == "prompt 1"
    for ids in ([], [-1], [321]):
        with pytest.raises(InputError, match="token ids do not fit"):
            model.generate_ids([None], [ids])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_images_are_named(variant: str, opened: Opened, tmp_path: Path) -> None:
    model, broken = opened(variant), tmp_path / "broken.png"
    broken.write_bytes(image_path(variant).read_bytes()[:500])
    with pytest.raises(InputError) as caught:
        model.answer([image_path(variant), broken], ASKED)
    assert caught.value.where == str(broken)
    with pytest.raises(InputError, match="cannot be read"):
        model.stream_answer(tmp_path / "missing.png", ASKED)
    with pytest.raises(InputError) as caught:
        model.answer([image_path(variant), b"no image"], ASKED)
    assert caught.value.where == "image 1"
    with pytest.raises(InputError, match="too long and thin"):
        model.answer(Image.new("L", (1, 4_000_000)), ASKED)


def test_streams_check_before_they_run(opened: Opened) -> None:
    words = opened("450m").stream_answer(image_path("450m"), ASKED, max_new_tokens=12)
    first = next(words)
    assert first
    assert "\ufffd" not in first
    assert first + "".join(words) == opened("450m").answer(image_path("450m"), ASKED, max_new_tokens=12)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cosines(variant: str, opened: Opened) -> None:
    chat = opened(variant)
    model = Model(chat.session)
    images: list[ImageSource] = [image_path(variant), *other_images()]
    ((_, features),) = chat.rows.features([images[0]])
    mean = features.reshape(-1, features.shape[-1]).mean(axis=0)
    rows = model.encode_image(images, batch_size=3)
    assert rows.shape == (4, model.embed_dim)
    assert np.allclose(rows[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    words = model.encode_text(["a cat", "what"])
    mean = chat.rows.embedded(model.session.tokenizer.prompt_ids("a cat")).mean(axis=0)
    assert np.allclose(words[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(model.embedding.similarity(images, ["a cat", "what"]), rows @ words.T, atol=1e-6)
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, model.embed_dim)
    with pytest.raises(InputError, match="empty text"):
        model.encode_text(["a", ""])
    with pytest.raises(InputError, match="not trained to score"):
        model.classify(images, ["cat", "dog"])


def test_ids_have_the_embeddings_of_their_texts(opened: Opened) -> None:
    model = Model(opened("450m").session)
    rows = model.session.tokenizer.encode_rows(OTHERS[:2])
    longest = max(map(len, rows))
    ids, mask = (np.zeros((2, longest), np.int64) for _ in range(2))
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    assert np.allclose(model.encode_ids(rows[:1]), model.encode_text(OTHERS[0]), atol=1e-6)
    assert np.allclose(model.encode_ids(ids, mask), model.encode_text(OTHERS[:2]), atol=1e-6)


def test_embeddings_of_texts_do_not_depend_on_the_batch(opened: Opened) -> None:
    model = Model(opened("split").session)
    together = model.encode_text(OTHERS, batch_size=64)
    for batch_size in (1, 2):
        assert np.allclose(model.encode_text(OTHERS, batch_size=batch_size), together, atol=1e-6)
    assert np.allclose(model.encode_text(OTHERS[2]), together[2:3], atol=1e-6)
    with pytest.raises(UsageError, match="batch_size"):
        model.encode_text(OTHERS, batch_size=0)
    with pytest.raises(InputError, match="an empty text") as caught:
        model.encode_text(["a", "b", ""])
    assert caught.value.where == "text 2"


def test_errors_count_over_all_batches(opened: Opened) -> None:
    model, good = opened("split"), image_path("split").read_bytes()
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        model.answer([good] * 5 + [b"bad"], ASKED, max_new_tokens=1)
    assert caught.value.where == "image 5"
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        model.answer([None, [good, good], good, None, [good, b"bad"]], ASKED, max_new_tokens=1)
    assert caught.value.where == "image 4"
    with pytest.raises(InputError, match="surrogate") as caught:
        model.answer(good, [ASKED] * 5 + ["\ud800"], max_new_tokens=1)
    assert caught.value.where.startswith("question 5")


def test_an_image_that_pillow_has_only_opened_serves_several_rows(opened: Opened) -> None:
    # In two threads, of which one decodes.
    model = load(opened("split").session.bundle.root, threads=2).chatting
    expected = model.answer([image_path("split")] * 3, OTHERS[:3], max_new_tokens=2)
    with Image.open(image_path("split")) as image:
        assert model.answer([image] * 3, OTHERS[:3], max_new_tokens=2) == expected


def test_numbers_of_numpy_are_options(opened: Opened) -> None:
    model, options = opened("split"), {"top_k": 5, "seed": 3, "max_new_tokens": 4, "temperature": 0.5}
    numbers: dict[str, Any] = {
        name: np.int64(value) if isinstance(value, int) else np.float32(value) for name, value in options.items()
    }
    plain: dict[str, Any] = dict(options)
    image = image_path("split")
    assert model.answer(image, ASKED, sample=True, **numbers) == model.answer(image, ASKED, sample=True, **plain)


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
        ("split", lambda m: m["image"].update(global_tile=False), "global"),
        ("split", lambda m: m["tasks"][0].update(global_image_token=None), "global"),
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
        load(folder, threads=1).answer(image_path(variant), ASKED)


def test_the_identity_knows_the_tiles(nanovlm_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    source = nanovlm_bundle("split")
    other = changed_bundle(source, tmp_path, lambda m: m["image"].update(resize_to_max_side=False))
    assert load(source).identity != load(other).identity


def test_a_decoder_that_breaks_is_named(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("222m")
    decoder = model.session.engine("decoder")
    outputs = {port.name: np.zeros((1, 2, 13, 12), np.float32) for port in decoder.outputs}
    monkeypatch.setattr(decoder, "run", lambda feeds: {**outputs, "logits": np.full((1, 13, 320), np.nan)})
    with pytest.raises(InputError, match="not finite"):
        model.answer(image_path("222m"), ASKED)
