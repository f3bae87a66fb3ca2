"""Features of slices of exported bundles against the originals' records, in batches of any size, and on disk."""

from __future__ import annotations

import json
import pickle
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from vlm_export.runtime.tasks.feature_files import SliceFileMeta, write_slice_features

import vlm_export
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import TensorInfo
from vlm_export.runtime.inputs.slice_plan import SlicePlan
from vlm_export.runtime.inputs.slices import Slices
from vlm_export.runtime.search.store import npy_metadata, read_embeddings
from vlm_export.runtime.tasks import features as slice_features
from vlm_export.runtime.tasks.features import SliceEncoder, SliceFeatures

pytestmark = pytest.mark.needs_torch

DATA = Path(__file__).parents[1] / "data"
PICTURES = DATA / "minicpmv" / "preprocess"
Array = npt.NDArray[Any]
Bundle = Callable[[str], Path]
Same = Callable[..., None]


@pytest.fixture(scope="module")
def oracle() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DATA.parent / "models" / "minicpmv_oracle.py")))


@pytest.fixture
def encoder(slice_bundle: Bundle) -> Callable[[str], SliceEncoder]:
    return lambda variant: vlm_export.load_slice_encoder(slice_bundle(variant), threads=1)


@pytest.mark.parametrize("variant", ["v1_0", "omnilmm"])
def test_a_square_is_the_record(variant: str, encoder: Any, oracle: Any, assert_same: Same) -> None:
    """From the picture's file to the language model."""
    (found,) = encoder(variant).encode_slices(DATA / "minicpmv" / variant / "image.png")
    assert found.image_features.dtype == np.float32
    assert_same(found.image_features, oracle.golden(variant)["preprocess.resampler"])
    assert found.plan.grid is None


@pytest.mark.parametrize(("variant", "version"), [("v2_0", "2.0"), ("v2_5", "2.5"), ("v2_6", "2.6")])
@pytest.mark.parametrize("name", ["wide", "small"])
def test_pictures_are_those_of_the_original(
    variant: str, version: str, name: str, encoder: Any, oracle: Any, assert_same: Same, build_model: Any
) -> None:
    """The recorded slices of the recorded picture, through the eager module one by one."""
    record = oracle.golden("preprocess")
    part = oracle.part_of(build_model(oracle.DATA / variant), "vision")
    sizes = record[f"{version}.{name}.tgt_sizes"]
    inputs = [{"pixel_values": record[f"{version}.{name}.slice{i}"][None]} for i in range(len(sizes))]
    if version != "2.0":
        inputs = [{**entry, "tgt_sizes": sizes[i : i + 1]} for i, entry in enumerate(inputs)]
    expected = np.concatenate([oracle.run_module(part, entry) for entry in inputs])
    (found,) = encoder(variant).encode_slices([PICTURES / f"{name}.png"])
    assert_same(found.image_features, expected)
    assert np.array_equal(found.tgt_sizes, sizes)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("variant", ["v2_5", "v2_6", "v4_5"])
def test_shapes_share_a_batch(
    variant: str, batch_size: int, encoder: Any, oracle: Any, assert_same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of four slices of four shapes: each as the original computes it alone, also for 2.5."""
    record = oracle.golden(variant)
    pixels = tuple(oracle.packed(record[f"input.image_{i}"]) for i in range(4))
    slices = Slices(SlicePlan((1, 1), (1, 1), None, 14), pixels, record["input.tgt_sizes"].astype(np.int64))
    monkeypatch.setattr(slice_features, "slice_image", lambda *args, **options: slices)
    found = encoder(variant).encode_slices([Image.new("RGB", (1, 1))] * 2, batch_size=batch_size)
    expected = np.concatenate([record[f"output.resampler_single_{i}"] for i in range(4)])
    for features in found:
        assert_same(features.image_features, expected)


@pytest.mark.parametrize("variant", ["v2_0", "v2_6"])
def test_batches_are_one_by_one(variant: str, encoder: Any, assert_same: Same) -> None:
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


def test_sources_of_all_kinds(encoder: Any) -> None:
    path, model = PICTURES / "wide.png", encoder("v2_0")
    with Image.open(path) as image:
        found = model.encode_slices([path, str(path), path.read_bytes(), image])
    for entry in found[1:]:
        assert np.array_equal(entry.image_features, found[0].image_features)
    assert model.encode_slices([]) == []


def test_what_stands_around_the_features(encoder: Any) -> None:
    (found,) = encoder("v2_6").encode_slices(PICTURES / "wide.png")
    assert found.parts(image_index=3) == ("<image_id>3</image_id><image>", 0, "</image><slice>", 1, *_SECOND)
    assert found.text() == _TEXT.replace("?", "<unk>" * 5)
    assert len(found.image_features) == 3


_SECOND = ("</slice><slice>", 2, "</slice>")
_TEXT = "<image_id>0</image_id><image>?</image><slice>?</slice><slice>?</slice>"


def test_a_square_of_no_whole_patches_is_padded(encoder: Any, oracle: Any, assert_same: Same, tmp_path: Path) -> None:
    """timm pads with zeros below and on the right."""
    model = encoder("v2_0")
    pixels = oracle.golden("v2_0")["input.pixel_53x47"]
    slices = Slices(SlicePlan((1, 1), (47, 53), None, 14), (pixels[0],), np.array([[4, 4]]))
    model._cut = lambda *args: slices
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
    record: str, ids: list[list[int]], encoder: Any, oracle: Any, assert_same: Same
) -> None:
    model, golden = encoder("v4_5"), oracle.golden("v4_5")
    model._engines["vision_tokens"] = RecordedTokens(golden["input.video_features"])
    frames = [Image.new("RGB", (56, 56))] * 3
    assert_same(model.encode_video(frames, ids, batch_size=2), golden[f"output.resampler_{record}"])


def test_frames_without_a_time_are_pictures(encoder: Any, assert_same: Same) -> None:
    """Of a size that is not cut; larger ones are not cut either."""
    model, picture = encoder("v4_5"), PICTURES / "small.png"
    (expected,) = model.encode_slices(picture)
    assert len(expected.image_features) == 1
    assert_same(model.encode_video([picture, picture], [[-1], [-1]]), np.repeat(expected.image_features, 2, axis=0))
    (wide,) = model.encode_slices(PICTURES / "wide.png")
    assert len(wide.image_features) == 3
    found = model.encode_video([PICTURES / "wide.png"], [[-1]])
    assert_same(found, wide.image_features[:1])


def test_videos_that_are_refused(encoder: Any) -> None:
    frames: list[Any] = [PICTURES / "small.png"] * 2
    with pytest.raises(InputError, match="knows no videos"):
        encoder("v2_6").encode_video(frames, [[0, 1]])
    for ids in ([[0]], [[0, 1], []], [[0, 1, 2]]):
        with pytest.raises(UsageError, match="do not fit the frames"):
            encoder("v4_5").encode_video(frames, ids)


# What is refused


def test_an_encoder_pair_is_another_thing(slice_bundle: Bundle) -> None:
    for opened in (vlm_export.load, vlm_export.load_vision_language):
        with pytest.raises(InputError, match="no encoder pair") as caught:
            opened(slice_bundle("v2_6"))
        assert "load_slice_encoder" in caught.value.fix
    with pytest.raises(InputError, match="does not cut pictures"):
        vlm_export.load_slice_encoder(DATA / "runtime" / "tiny_bundle")


def test_it_travels_to_workers(encoder: Any) -> None:
    opened, path = encoder("v1_0"), DATA / "minicpmv" / "v1_0" / "image.png"
    (expected,) = opened.encode_slices(path)
    again = pickle.loads(pickle.dumps(opened))
    assert type(again) is SliceEncoder
    assert (again.encode_slices(path)[0].image_features == expected.image_features).all()


def test_pictures_that_are_refused(encoder: Any, tmp_path: Path) -> None:
    model = encoder("v2_6")
    with pytest.raises(InputError, match="cannot be read") as caught:
        model.encode_slices([PICTURES / "small.png", tmp_path / "nowhere.png"])
    assert "nowhere.png" in caught.value.where
    with pytest.raises(InputError, match="too long and thin") as caught:
        model.encode_slices([Image.new("RGB", (1, 20000))])
    assert caught.value.where == "picture 0"
    with pytest.raises(UsageError, match="batch_size"):
        model.encode_slices(PICTURES / "small.png", batch_size=0)


def test_a_bundle_that_does_not_cut_is_refused(encoder: Any) -> None:
    bundle = encoder("v2_6").bundle
    whole = SimpleNamespace(manifest=SimpleNamespace(name="whole", family="clip", image=None))
    assert slice_features.slice_spec_of(bundle) == bundle.manifest.image
    with pytest.raises(InputError, match="does not cut pictures"):
        slice_features.slice_spec_of(whole)  # type: ignore[arg-type]  # What it reads of a bundle, and no more.


def test_features_that_are_not_finite_are_refused(encoder: Any) -> None:
    model = encoder("v2_6")
    right = model.engine("vision")
    nan = {"image_features": np.full((1, 5, 256), np.nan, np.float32)}
    model._engines["vision"] = SimpleNamespace(inputs=right.inputs, outputs=right.outputs, run=lambda feeds: nan)
    with pytest.raises(InputError, match="not finite"):
        model.encode_slices(PICTURES / "small.png")


def test_identity(encoder: Any) -> None:
    assert encoder("v2_6").identity == encoder("v2_6").identity != encoder("v2_5").identity


# Files


@pytest.fixture
def written(encoder: Any) -> tuple[list[tuple[str, SliceFeatures]], SliceFileMeta]:
    model = encoder("v2_6")
    names = ["wide", "small"]
    features = model.encode_slices([PICTURES / f"{name}.png" for name in names])
    meta = SliceFileMeta("tiny", model.identity, model.feature_shape)
    return list(zip(names, features, strict=True)), meta


ROWS = [("wide", 0, 3, 6), ("wide", 1, 4, 4), ("wide", 2, 4, 4), ("small", 0, 4, 4)]


def test_npy_files(written: Any, tmp_path: Path) -> None:
    pictures, meta = written
    path = tmp_path / "f.npy"
    assert write_slice_features(path, pictures * 300, meta) == (600, 1200)
    assert np.load(path).shape == (1200, 5, 256)
    assert write_slice_features(path, iter(pictures), meta, overwrite=True) == (2, 4)
    found = np.load(path, mmap_mode="r")
    assert np.array_equal(found, np.concatenate([features.image_features for _, features in pictures]))
    data = npy_metadata(tmp_path / "f.npy")
    assert [tuple(row.values()) for row in data["rows"]] == ROWS
    assert (data["kind"], data["model"], data["shape"]) == ("slices", "tiny", [5, 256])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy"]


def test_parquet_files(written: Any, tmp_path: Path) -> None:
    import pyarrow.parquet

    pictures, meta = written
    path = tmp_path / "f.parquet"
    assert write_slice_features(path, iter(pictures), meta) == (2, 4)
    table = pyarrow.parquet.read_table(path)
    found = table["features"].combine_chunks().to_numpy_ndarray()
    assert np.array_equal(found, np.concatenate([features.image_features for _, features in pictures]))
    assert [tuple(row.values()) for row in table.select(["item", "slice", "rows", "columns"]).to_pylist()] == ROWS
    assert json.loads(table.schema.metadata[b"vlm_export"])["kind"] == "slices"


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_files_of_slices_are_not_searched(name: str, written: Any, tmp_path: Path) -> None:
    write_slice_features(tmp_path / name, *written)
    with pytest.raises(InputError, match="nothing in it to search"):
        read_embeddings(tmp_path / name)


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_a_picture_that_fails_leaves_the_old_file(name: str, written: Any, tmp_path: Path) -> None:
    pictures, meta = written
    path = tmp_path / name
    write_slice_features(path, pictures, meta)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def failing() -> Iterator[tuple[str, SliceFeatures]]:
        yield pictures[0]
        raise InputError("a picture cannot be read")

    with pytest.raises(InputError, match="cannot be read"):
        write_slice_features(path, failing(), meta, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        write_slice_features(tmp_path / "nowhere" / name, pictures, meta)
    with pytest.raises(UsageError, match="another shape"):
        write_slice_features(path, pictures, SliceFileMeta("tiny", "", (5, 255)), overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_name_that_is_no_unicode(written: Any, tmp_path: Path) -> None:
    pictures, meta = written
    odd = [("a\udcff.png", features) for _, features in pictures]
    assert write_slice_features(tmp_path / "f.npy", odd, meta) == (2, 4)
    with pytest.raises(InputError, match="not Unicode"):
        write_slice_features(tmp_path / "f.parquet", odd, meta)
