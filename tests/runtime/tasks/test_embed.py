"""Embeddings of a tiny bundle are what its modules gave in PyTorch, for any batching."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import TensorInfo
from vlm_export.runtime.tasks.embed import probabilities, unit_rows
from vlm_export.specs import TextSpec
from vlm_export.specs.tasks import EmbedSpec, ScoreSpec

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "runtime"


@pytest.fixture(scope="module")
def pair(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    listing: dict[str, Any] = json.loads((folder / "tiny_embeddings.json").read_text(encoding="utf-8"))
    arrays = np.load(folder / "tiny_embeddings.npz")
    unit = {name: arrays[name] / np.linalg.norm(arrays[name], axis=1, keepdims=True) for name in arrays.files}
    return {**listing, "images": unit["images"], "texts_unit": unit["texts"]}


@pytest.fixture
def changed(tiny_bundle: Path, model_with: Callable[..., Model]) -> Callable[..., Model]:
    return partial(model_with, tiny_bundle)


def embed_spec(model: Model) -> EmbedSpec:
    spec = model.manifest.task(EmbedSpec)
    assert spec is not None
    return spec


def text_spec(model: Model) -> TextSpec:
    assert model.manifest.text is not None
    return model.manifest.text


def assert_same_rows(got: Array, expected: Array) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_images_equal_torch(pair: Model, folder: Path, record: dict[str, Any], batch_size: int) -> None:
    paths = [folder / "images" / name for name in record["files"]]
    assert_same_rows(pair.encode_image(paths, batch_size=batch_size), record["images"])


def test_images_may_be_paths_bytes_or_pillow(pair: Model, folder: Path, record: dict[str, Any]) -> None:
    path = folder / "images" / "large.png"
    expected = record["images"][[record["files"].index("large.png")]]
    with Image.open(path) as image:
        for source in (path, str(path), path.read_bytes(), image):
            assert_same_rows(pair.encode_image(source), expected)
        mixed = pair.encode_image([path, image])
    assert mixed.shape == (2, 12)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_texts_equal_torch_in_their_order(pair: Model, record: dict[str, Any], batch_size: int) -> None:
    assert_same_rows(pair.encode_text(record["texts"], batch_size=batch_size), record["texts_unit"])


def test_one_text_is_a_batch_of_one(pair: Model, record: dict[str, Any]) -> None:
    assert_same_rows(pair.encode_text("a cat"), record["texts_unit"][[1]])


def test_ids_equal_texts(pair: Model, record: dict[str, Any]) -> None:
    for row, expected in zip(record["ids"], record["texts_unit"], strict=True):
        padded = [*row, *[0] * (20 - len(row))]
        assert_same_rows(pair.encode_ids([row]), expected[None])
        assert_same_rows(pair.encode_ids(np.array([padded], dtype=np.int32)), expected[None])


class MaskedText:
    """Stands for a text part with a mask: the masked sum of the ids, their number, and the row's width."""

    inputs = tuple(TensorInfo(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    outputs = (
        TensorInfo("text_embeds", "float32", ("batch", 12)),
        TensorInfo("last_hidden_state", "float32", ("batch", None, 4)),
    )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        assert ids.dtype == mask.dtype == np.int64
        embeds = np.zeros((len(ids), 12), np.float32)
        embeds[:, 0], embeds[:, 1] = (ids * mask).sum(axis=1) / 100, mask.sum(axis=1)
        return {"text_embeds": embeds, "last_hidden_state": np.zeros((*ids.shape, 4), np.float32)}


@pytest.fixture
def masked_pair(tiny_bundle: Path, engine_put: Callable[[Model, str, Any], None]) -> Model:
    pair = load(tiny_bundle, threads=1)
    engine_put(pair, "text", MaskedText())
    return pair


def test_texts_are_masked_where_the_graph_takes_a_mask(masked_pair: Model, record: dict[str, Any]) -> None:
    got = masked_pair.encode_text(record["texts"], batch_size=4)
    rows = masked_pair.session.tokenizer.encode_rows(record["texts"])
    sums = np.array([[sum(row) / 100, len(row)] for row in rows])
    assert np.abs(got[:, :2] - sums / np.linalg.norm(sums, axis=1, keepdims=True)).max() <= 1e-6
    assert len({len(row) for row in rows}) > 1


def test_ids_take_a_mask_or_have_none_padded(masked_pair: Model, pair: Model) -> None:
    short, padded = [[5, 6, 7]], [[5, 6, 7, 9, 9]]
    expected = masked_pair.encode_ids(short)
    for mask in ([[1, 1, 1, 0, 0]], np.array([[True, True, True, False, False]])):
        assert np.array_equal(masked_pair.encode_ids(padded, mask), expected)
    assert np.array_equal(masked_pair.encode_ids(padded), masked_pair.encode_ids(padded, np.ones((1, 5), np.int32)))
    assert not np.array_equal(masked_pair.encode_ids(padded), expected)
    assert masked_pair.encode_ids(np.zeros((0, 3), np.int64), np.zeros((0, 3), np.int64)).shape == (0, 12)
    with pytest.raises(UsageError, match="takes no attention_mask"):
        pair.encode_ids(short, [[1, 1, 1]])


@pytest.mark.parametrize("mask", [[1, 1, 1], [[1, 1]], [[1.0, 1.0, 1.0]], [[1, 2, 0]], [[1, -1, 0]], [[0, 0, 0]]])
def test_masks_that_do_not_fit_are_refused(masked_pair: Model, mask: list[Any]) -> None:
    with pytest.raises(InputError, match="attention mask does not fit"):
        masked_pair.encode_ids([[5, 6, 7]], mask)


def test_nothing_gives_no_rows(pair: Model) -> None:
    for rows in (pair.encode_image([]), pair.encode_text([]), pair.encode_ids(np.zeros((0, 3), np.int64))):
        assert rows.shape == (0, 12)
        assert rows.dtype == np.float32


def widths_of(pair: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the rows that the text part gets from now on."""
    widths: list[int] = []
    engine = pair.session.engine("text")
    run = engine.run

    def spy(feeds: Mapping[str, Array]) -> dict[str, Array]:
        widths.append(feeds["input_ids"].shape[1])
        return run(feeds)

    monkeypatch.setattr(engine, "run", spy)
    return widths


def test_short_texts_do_not_pay_for_long_ones(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load(tiny_bundle, threads=1)
    widths = widths_of(pair, monkeypatch)
    pair.encode_text(["cat", "a photo of a dog", "dog", "the the the the the"], batch_size=2)
    assert widths == [3, 9]


def test_rows_are_as_long_as_the_context_where_the_model_was_trained_so(
    changed: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = changed(text=replace(text_spec(changed()), padding="context"))
    widths = widths_of(pair, monkeypatch)
    pair.encode_text(["cat", "a photo of a dog"], batch_size=1)
    pair.encode_ids([[523, 320, 515, 524]])
    assert widths == [20, 20, 20]


def test_padding_up_to_the_context_is_masked(
    changed: Callable[..., Model], engine_put: Callable[[Model, str, Any], None], masked_pair: Model
) -> None:
    pair = changed(text=replace(text_spec(changed()), padding="context", pad_token_id=7))
    engine_put(pair, "text", MaskedText())
    assert np.array_equal(pair.encode_text(["a cat"]), masked_pair.encode_text(["a cat"]))
    assert np.array_equal(pair.encode_ids([[5, 6, 9]], [[1, 1, 0]]), masked_pair.encode_ids([[5, 6, 9]], [[1, 1, 0]]))


def test_graphs_are_opened_on_first_use(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(folder / "tiny_bundle", bundle)
    (bundle / "onnx" / "vision_model.onnx").write_bytes(b"damaged")
    pair = load(bundle, threads=1)
    assert pair.encode_text(["a cat"]).shape == (1, 12)
    with pytest.raises(InputError, match="vision_model"):
        pair.encode_image(folder / "images" / "large.png")


def test_probabilities_are_the_softmax_of_scaled_cosines(pair: Model, folder: Path, record: dict[str, Any]) -> None:
    paths = [folder / "images" / name for name in record["files"][:3]]
    labels = ["cat", "dog", "{thing}"]
    shares = pair.classify(paths, labels)
    cosines = record["images"][:3] @ pair.encode_text([f"a photo of a {label}" for label in labels]).T
    expected = np.exp(20 * cosines) / np.exp(20 * cosines).sum(axis=1, keepdims=True)
    assert shares.dtype == np.float32
    assert np.abs(shares - expected).max() <= 1e-4
    assert pair.embedding.score.scale == pytest.approx(20.0)
    plain = pair.classify(paths[0], labels, template="{}")
    assert plain.shape == (1, 3)
    assert np.abs(plain - shares[:1]).max() > 1e-3


def test_each_label_stands_by_itself_where_the_score_is_a_sigmoid(
    changed: Callable[..., Model], folder: Path, record: dict[str, Any]
) -> None:
    labels, paths = ["cat", "dog"], [folder / "images" / name for name in record["files"][:3]]
    pair = changed(tasks=(replace(embed_spec(changed()), score=ScoreSpec("sigmoid", math.log(10), -3.5)),))
    shares = pair.classify(paths, labels, template="{}")
    cosines = record["images"][:3] @ pair.encode_text(labels).T
    assert shares.dtype == np.float32
    assert np.abs(shares - 1 / (1 + np.exp(3.5 - 10 * cosines))).max() <= 1e-5
    assert np.abs(pair.classify(paths, labels[:1], template="{}") - shares[:, :1]).max() <= 1e-6


@pytest.mark.filterwarnings("error")
def test_a_sigmoid_of_extreme_scores_is_no_overflow() -> None:
    cosines = np.array([[1.0, -1.0, 0.0]], np.float32)
    assert probabilities(cosines, ScoreSpec("sigmoid", math.log(1e30))).tolist() == [[1.0, 0.0, 0.5]]


def test_wrong_labels_and_templates(pair: Model, folder: Path) -> None:
    image = folder / "images" / "large.png"
    wrong: tuple[Sequence[str], ...] = ([], "cat")
    for labels in wrong:
        with pytest.raises(UsageError, match="labels"):
            pair.classify(image, labels)
    with pytest.raises(UsageError, match="template"):
        pair.classify(image, ["cat"], template="a photo")


def test_bad_image_in_a_batch_is_named(pair: Model, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"broken\.png"):
        pair.encode_image([folder / "images" / "large.png", tmp_path / "broken.png"])
    with pytest.raises(InputError, match="image 1"):
        pair.encode_image([Image.new("RGB", (3, 3)), Image.new("RGB", (1, 4_000_000))])
    with pytest.raises(InputError, match="too many pixels"):
        load(folder / "tiny_bundle", max_pixels=100).encode_image(folder / "images" / "large.png")


def test_without_a_tokenizer_ids_still_work(changed: Callable[..., Model]) -> None:
    files = changed().manifest.files
    pair = changed(files={name: files[name] for name in files if name != "tokenizer.json"})
    with pytest.raises(InputError, match="--tokenizer"):
        pair.encode_text(["a cat"])
    assert pair.encode_ids([[523, 320, 515, 524]]).shape == (1, 12)


@pytest.mark.parametrize("ids", [[1, 2], [[1.5]], [[525]], [[-1]], [[1] * 21], [[]]])
def test_ids_out_of_range_are_refused(pair: Model, ids: list[Any]) -> None:
    with pytest.raises(InputError, match="token ids"):
        pair.encode_ids(ids)


def test_a_model_without_a_score_gives_no_probabilities(changed: Callable[..., Model]) -> None:
    pair = changed(tasks=(replace(embed_spec(changed()), score=None),))
    with pytest.raises(InputError, match="no scale for probabilities") as caught:
        pair.classify(Image.new("RGB", (30, 30)), ["cat"])
    assert "match" in caught.value.fix


def test_a_tower_alone_says_what_it_lacks(changed: Callable[..., Model]) -> None:
    spec, image = embed_spec(changed()), Image.new("RGB", (30, 30))
    texts, images = (changed(tasks=(spec.limited_to([part]),)) for part in ("text", "vision"))
    assert texts.encode_text("a cat").shape == images.encode_image(image).shape == (1, 12)
    assert texts.embed_dim == images.embed_dim == 12
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: texts.encode_image(image), "encodes no images"),
        (lambda: images.encode_text("a cat"), "encodes no texts"),
        (lambda: images.encode_ids([[523, 524]]), "encodes no texts"),
    ]
    for ask, what in refused:
        with pytest.raises(InputError, match=what) as caught:
            ask()
        assert caught.value.fix


def test_images_or_texts_missing_from_the_manifest(changed: Callable[..., Model]) -> None:
    with pytest.raises(InputError, match="takes no images"):
        changed(image=None).encode_image(Image.new("RGB", (30, 30)))
    with pytest.raises(InputError, match="takes no texts"):
        changed(text=None).encode_text(["a cat"])


def test_identity_names_the_model_not_the_export(changed: Callable[..., Model], pair: Model) -> None:
    source = pair.manifest.source
    assert changed(name="renamed", tools={"onnx": "2"}).identity == pair.identity
    assert changed(source=replace(source, random_weights_seed=1)).identity != pair.identity
    assert changed(source=replace(source, random_weights_seed=None)).identity != pair.identity


def test_identity_tells_how_images_are_prepared(changed: Callable[..., Model], pair: Model) -> None:
    for other in ({"crop": "down"}, {"transparency": "white"}, {"resample": "box"}, {"rescale_factor": 1.0}):
        assert changed(image=replace(pair.session.image_spec, **other)).identity != pair.identity


def test_progress_goes_to_stderr(pair: Model, capsys: pytest.CaptureFixture[str]) -> None:
    pair.encode_text(["a cat"], progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1/1" in captured.err
    pair.encode_text(["a cat"])
    assert capsys.readouterr().err == ""


def test_zero_embedding_stays_zero() -> None:
    rows = unit_rows(np.array([[0, 0], [3, 4]], dtype=np.float32)).tolist()
    assert rows == [[0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]


@pytest.mark.parametrize("labels", [np.array(["a cat", "a dog"]), ("a cat", "a dog"), iter(["a cat", "a dog"])])
def test_labels_may_be_any_sequence(pair: Model, folder: Path, labels: Sequence[str]) -> None:
    assert pair.classify(folder / "images" / "large.png", labels).shape == (1, 2)


def test_labels_that_are_none_are_refused(pair: Model, folder: Path) -> None:
    wrong: list[Any] = ["a cat", [], np.array([]), [1], [None]]
    for labels in wrong:
        with pytest.raises(UsageError, match="needs a list of labels"):
            pair.classify(folder / "images" / "large.png", labels)


@pytest.mark.parametrize("ids", [[[1, 2], [3]], [[2**70]], "text", None])
def test_ids_that_make_no_matrix_are_refused(pair: Model, ids: Any) -> None:
    with pytest.raises(InputError, match="do not fit the model"):
        pair.encode_ids(ids)


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True, None])
def test_batch_sizes_are_whole_numbers(pair: Model, folder: Path, size: Any) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        pair.encode_image(folder / "images" / "large.png", batch_size=size)
    assert pair.encode_image(folder / "images" / "large.png", batch_size=np.int64(2)).shape == (1, 12)
