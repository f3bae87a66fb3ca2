"""Features of slices on disk: what is written is read back, told apart from embeddings, and whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vlm_export import load
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.search.feature_files import SliceFileMeta, write_slice_features
from vlm_export.runtime.search.store import npy_metadata, read_embeddings
from vlm_export.runtime.tasks.features import SliceFeatures

pytestmark = pytest.mark.needs_torch

IMAGES = Path(__file__).parents[2] / "data" / "minicpmv" / "preprocess"
Written = tuple[list[tuple[str, SliceFeatures]], SliceFileMeta]


@pytest.fixture(scope="module")
def written(slice_bundle: Callable[[str], Path]) -> Written:
    model = load(slice_bundle("v2_6"), threads=1)
    names = ["wide", "small"]
    features = model.features([IMAGES / f"{name}.png" for name in names])
    meta = SliceFileMeta("tiny", model.identity, model.slices.feature_shape)
    return list(zip(names, features, strict=True)), meta


ROWS = [("wide", 0, 3, 6), ("wide", 1, 4, 4), ("wide", 2, 4, 4), ("small", 0, 4, 4)]


def test_npy_files(written: Written, tmp_path: Path) -> None:
    images, meta = written
    path = tmp_path / "f.npy"
    assert write_slice_features(path, images * 300, meta) == (600, 1200)
    assert np.load(path).shape == (1200, 5, 256)
    assert write_slice_features(path, iter(images), meta, overwrite=True) == (2, 4)
    found = np.load(path, mmap_mode="r")
    assert np.array_equal(found, np.concatenate([features.image_features for _, features in images]))
    data = npy_metadata(tmp_path / "f.npy")
    assert [tuple(row.values()) for row in data["rows"]] == ROWS
    assert (data["kind"], data["model"], data["shape"]) == ("slices", "tiny", [5, 256])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy"]


def test_parquet_files(written: Written, tmp_path: Path) -> None:
    import pyarrow.parquet

    images, meta = written
    path = tmp_path / "f.parquet"
    assert write_slice_features(path, iter(images), meta) == (2, 4)
    table = pyarrow.parquet.read_table(path)
    found = table["features"].combine_chunks().to_numpy_ndarray()
    assert np.array_equal(found, np.concatenate([features.image_features for _, features in images]))
    assert [tuple(row.values()) for row in table.select(["item", "slice", "rows", "columns"]).to_pylist()] == ROWS
    assert json.loads(table.schema.metadata[b"vlm_export"])["kind"] == "slices"


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_files_of_slices_are_not_searched(name: str, written: Written, tmp_path: Path) -> None:
    write_slice_features(tmp_path / name, *written)
    with pytest.raises(InputError, match="nothing in it to search"):
        read_embeddings(tmp_path / name)


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_an_image_that_fails_leaves_the_old_file(name: str, written: Written, tmp_path: Path) -> None:
    images, meta = written
    path = tmp_path / name
    write_slice_features(path, images, meta)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def failing() -> Iterator[tuple[str, SliceFeatures]]:
        yield images[0]
        raise InputError("an image cannot be read")

    with pytest.raises(InputError, match="cannot be read"):
        write_slice_features(path, failing(), meta, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        write_slice_features(tmp_path / "nowhere" / name, images, meta)
    with pytest.raises(UsageError, match="another shape"):
        write_slice_features(path, images, SliceFileMeta("tiny", "", (5, 255)), overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_name_that_is_no_unicode(written: Written, tmp_path: Path) -> None:
    images, meta = written
    odd = [("a\udcff.png", features) for _, features in images]
    assert write_slice_features(tmp_path / "f.npy", odd, meta) == (2, 4)
    with pytest.raises(InputError, match="not Unicode"):
        write_slice_features(tmp_path / "f.parquet", odd, meta)
