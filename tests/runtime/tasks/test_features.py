"""Features of slices of exported bundles against the originals' records, in batches of any size."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import TensorInfo
from vlm_export.runtime.inputs.slice_plan import SlicePlan
from vlm_export.runtime.inputs.slices import Slices
from vlm_export.runtime.tasks import features as slice_features
from vlm_export.runtime.tasks.features import FeatureTask

pytestmark = pytest.mark.needs_torch

DATA = Path(__file__).parents[2] / "data"
IMAGES = DATA / "minicpmv" / "preprocess"
Array = npt.NDArray[Any]
Bundle = Callable[[str], Path]
Encoder = Callable[[str], FeatureTask]
Same = Callable[..., None]


@pytest.fixture(scope="module")
def oracle() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DATA.parent / "models" / "minicpmv_oracle.py")))


@pytest.fixture(scope="module")
def encoder(slice_bundle: Bundle) -> Callable[[str], FeatureTask]:
    """The task of a variant, opened once; tests must not change it."""
    return cache(lambda variant: load(slice_bundle(variant), threads=1).slices)


@pytest.mark.parametrize("variant", ["v1_0", "omnilmm"])
def test_a_square_is_the_record(variant: str, encoder: Encoder, oracle: Any, assert_same: Same) -> None:
    """From the image's file to the language model."""
    (found,) = encoder(variant).encode_slices(DATA / "minicpmv" / variant / "image.png")
    assert found.image_features.dtype == np.float32
    assert_same(found.image_features, oracle.golden(variant)["preprocess.resampler"])
    assert found.plan.grid is None


@pytest.mark.parametrize(("variant", "version"), [("v2_0", "2.0"), ("v2_5", "2.5"), ("v2_6", "2.6")])
@pytest.mark.parametrize("name", ["wide", "small"])
def test_images_are_those_of_the_original(
    variant: str, version: str, name: str, encoder: Encoder, oracle: Any, assert_same: Same, build_model: Any
) -> None:
    """The recorded slices of the recorded image, through the eager module one by one."""
    record = oracle.golden("preprocess")
    part = oracle.part_of(build_model(oracle.DATA / variant), "vision")
    sizes = record[f"{version}.{name}.tgt_sizes"]
    inputs = [{"pixel_values": record[f"{version}.{name}.slice{i}"][None]} for i in range(len(sizes))]
    if version != "2.0":
        inputs = [{**entry, "tgt_sizes": sizes[i : i + 1]} for i, entry in enumerate(inputs)]
    expected = np.concatenate([oracle.run_module(part, entry) for entry in inputs])
    (found,) = encoder(variant).encode_slices([IMAGES / f"{name}.png"])
    assert_same(found.image_features, expected)
    assert np.array_equal(found.tgt_sizes, sizes)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("variant", ["v2_5", "v2_6", "v4_5"])
def test_shapes_share_a_batch(
    variant: str, batch_size: int, encoder: Encoder, oracle: Any, assert_same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of four slices of four shapes: each as the original computes it alone, also for 2.5."""
    record = oracle.golden(variant)
    pixels = tuple(oracle.packed(record[f"input.image_{i}"]) for i in range(4))
    slices = Slices(SlicePlan((1, 1), (1, 1), None, 14), pixels, record["input.tgt_sizes"].astype(np.int64))
    monkeypatch.setattr(slice_features, "slice_image", lambda *args, **options: slices)
    found = encoder(variant).encode_slices([Image.new("RGB", (1, 1))] * 2, batch_size=batch_size)
    expected = np.concatenate([record[f"output.resampler_single_{i}"] for i in range(4)])
    for features in found:
        assert_same(features.image_features, expected)


@pytest.mark.parametrize("variant", ["v2_0", "v2_6"])
def test_batches_are_one_by_one(variant: str, encoder: Encoder, assert_same: Same) -> None:
    sizes = [(100, 50), (30, 60), (112, 112), (50, 100), (100, 50)]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
    model = encoder(variant)
    alone = [model.encode_slices(image, batch_size=1)[0] for image in images]
    for batch_size in (2, 7):
        together = model.encode_slices(images, batch_size=batch_size)
        assert [len(entry.image_features) for entry in together] == [len(entry.plan.sizes) for entry in together]
        for one, other in zip(alone, together, strict=True):
            assert one.plan == other.plan
            assert_same(other.image_features, one.image_features, max_abs=1e-5)


def test_sources_of_all_kinds(encoder: Encoder) -> None:
    path, model = IMAGES / "wide.png", encoder("v2_0")
    with Image.open(path) as image:
        found = model.encode_slices([path, str(path), path.read_bytes(), image])
    for entry in found[1:]:
        assert np.array_equal(entry.image_features, found[0].image_features)
    assert model.encode_slices([]) == []


def test_what_stands_around_the_features(encoder: Encoder) -> None:
    (found,) = encoder("v2_6").encode_slices(IMAGES / "wide.png")
    assert found.parts(image_index=3) == ("<image_id>3</image_id><image>", 0, "</image><slice>", 1, *_SECOND)
    assert found.text() == _TEXT.replace("?", "<unk>" * 5)
    assert len(found.image_features) == 3


_SECOND = ("</slice><slice>", 2, "</slice>")
_TEXT = "<image_id>0</image_id><image>?</image><slice>?</slice><slice>?</slice>"


def test_a_square_of_no_whole_patches_is_padded(
    encoder: Encoder, oracle: Any, assert_same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm pads with zeros below and on the right."""
    model = encoder("v2_0")
    pixels = oracle.golden("v2_0")["input.pixel_53x47"]
    slices = Slices(SlicePlan((1, 1), (47, 53), None, 14), (pixels[0],), np.array([[4, 4]]))
    monkeypatch.setattr(slice_features, "slice_image", lambda *args, **options: slices)
    (found,) = model.encode_slices(Image.new("RGB", (1, 1)))
    assert_same(found.image_features, oracle.golden("v2_0")["output.resampler_53x47"])


# Videos


class RecordedTokens:
    """An engine that returns the recorded tokens of the frames, in order."""

    inputs = (TensorInfo("pixel_values", "float32", (None,) * 4), TensorInfo("tgt_sizes", "int64", (None, 2)))
    outputs = (TensorInfo("image_tokens", "float32", (None,) * 3),)

    def __init__(self, frames: Array) -> None:
        self.frames = iter(frames)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"image_tokens": np.stack([next(self.frames) for _ in feeds["pixel_values"]])}


@pytest.mark.parametrize(
    ("record", "ids"),
    [
        ("temporal_0_7_19", [[0, 7, 19]]),
        ("no_temporal", [[-1], [-1], [-1]]),
        ("temporal_pair_plus_single", [[3, 4], [-1]]),
    ],
)
def test_groups_of_frames_are_the_record(
    record: str,
    ids: list[list[int]],
    slice_bundle: Bundle,
    oracle: Any,
    assert_same: Same,
    engine_put: Callable[[Model, str, Any], None],
) -> None:
    model, golden = load(slice_bundle("v4_5"), threads=1), oracle.golden("v4_5")
    engine_put(model, "vision_tokens", RecordedTokens(golden["input.video_features"]))
    frames = [Image.new("RGB", (56, 56))] * 3
    assert_same(model.slices.encode_video(frames, ids, batch_size=2), golden[f"output.resampler_{record}"])


def test_frames_without_a_time_are_images(encoder: Encoder, assert_same: Same) -> None:
    """Of a size that is not cut; larger ones are not cut either."""
    model, image = encoder("v4_5"), IMAGES / "small.png"
    (expected,) = model.encode_slices(image)
    assert len(expected.image_features) == 1
    assert_same(model.encode_video([image, image], [[-1], [-1]]), np.repeat(expected.image_features, 2, axis=0))
    (wide,) = model.encode_slices(IMAGES / "wide.png")
    assert len(wide.image_features) == 3
    found = model.encode_video([IMAGES / "wide.png"], [[-1]])
    assert_same(found, wide.image_features[:1])


def test_videos_that_are_refused(encoder: Encoder) -> None:
    frames: list[Any] = [IMAGES / "small.png"] * 2
    with pytest.raises(InputError, match="knows no videos"):
        encoder("v2_6").encode_video(frames, [[0, 1]])
    for ids in ([[0]], [[0, 1], []], [[0, 1, 2]]):
        with pytest.raises(UsageError, match="do not fit the frames"):
            encoder("v4_5").encode_video(frames, ids)


# What is refused


def test_images_that_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    model = encoder("v2_6")
    with pytest.raises(InputError, match="cannot be read") as caught:
        model.encode_slices([IMAGES / "small.png", tmp_path / "nowhere.png"])
    assert "nowhere.png" in caught.value.where
    with pytest.raises(InputError, match="too long and thin") as caught:
        model.encode_slices([Image.new("RGB", (1, 20000))])
    assert caught.value.where == "image 0"
    with pytest.raises(UsageError, match="batch_size"):
        model.encode_slices(IMAGES / "small.png", batch_size=0)


def test_features_that_are_not_finite_are_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder("v2_6")
    engine = model.session.engine("vision")
    nan = {"image_features": np.full((1, 5, 256), np.nan, np.float32)}
    monkeypatch.setattr(engine, "run", lambda feeds: nan)
    with pytest.raises(InputError, match="not finite"):
        model.encode_slices(IMAGES / "small.png")


def test_identity(encoder: Encoder) -> None:
    first, other = (encoder(variant).session for variant in ("v2_6", "v2_5"))
    assert first.identity == load(first.bundle.root).identity != other.identity
