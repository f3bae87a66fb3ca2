"""Weights that processes share: packed once into the cache, the same vectors, and never from a damaged file."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export import Model, load

IDS = [[1, 2, 524], [1, 7, 524]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepacked"


@pytest.fixture
def shared(tiny_bundle: Path, cache: Path) -> Model:
    return load(tiny_bundle, threads=1, weights="shared")


@pytest.fixture
def expected(tiny_model: Model) -> Any:
    return tiny_model.encode_ids(IDS)


def test_the_vectors_are_the_same_and_the_files_are_written_once(shared: Model, cache: Path, expected: Any) -> None:
    np.testing.assert_array_equal(shared.encode_ids(IDS), expected)
    (folder,) = cache.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(before) == {"graph.onnx", "graph.onnx.data", "files.json"}
    again = pickle.loads(pickle.dumps(shared))
    np.testing.assert_array_equal(again.encode_ids(IDS), expected)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    shared.encode_image(np.zeros((24, 24, 3), np.uint8))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "record", "gone"])
def test_damaged_files_are_written_again(damage: str, shared: Model, cache: Path, expected: Any) -> None:
    shared.encode_ids(IDS)
    (folder,) = cache.iterdir()
    data, record = folder / "graph.onnx.data", folder / "files.json"
    whole = data.read_bytes()
    if damage == "record":
        record.write_text("{}")
    elif damage == "gone":
        shutil.rmtree(folder)
    else:
        data.write_bytes(whole[:-4] if damage == "cut" else bytes(byte ^ 1 for byte in whole))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shared)).encode_ids(IDS), expected)
    assert data.read_bytes() == whole


def test_workers_that_start_together_wait_for_one(shared: Model, cache: Path, expected: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(shared.encode_ids, [IDS, IDS], chunksize=1)
    assert len(list(cache.iterdir())) == 1
    for vectors in found:
        np.testing.assert_array_equal(vectors, expected)


@pytest.mark.needs_torch  # A fixture from outside of these tests.
def test_another_graph_has_files_of_its_own(
    shared: Model, cache: Path, tiny_bundle: Path, tmp_path: Path, relist: Callable[[Path], None]
) -> None:
    shared.encode_ids(IDS)
    copied = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    load(copied, threads=1, weights="shared").encode_ids(IDS)
    assert len(list(cache.iterdir())) == 1
    graph = copied / "onnx" / "text_model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x2a\x00")
    relist(copied)
    load(copied, threads=1, weights="shared").encode_ids(IDS)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.needs_torch  # OpenVINO is not installed without it.
def test_another_engine_holds_its_own(tiny_bundle: Path, cache: Path) -> None:
    load(tiny_bundle, threads=1, engine="openvino", weights="shared").encode_ids(IDS)
    assert not cache.exists()
