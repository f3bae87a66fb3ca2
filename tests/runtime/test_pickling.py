"""An opened bundle goes to workers as its path and options, and is checked again where it arrives."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import pytest

from vlm_export import EncoderPair, load
from vlm_export.errors import InputError

IDS = [[1, 2, 524]]


@pytest.fixture
def bundle(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data / "runtime" / "tiny_bundle", tmp_path / "pair"))


def test_a_spawned_worker_encodes_as_its_parent_does(bundle: Path) -> None:
    pair = load(bundle, threads=1)
    expected = pair.encode_text(["a red circle"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(pair.encode_text, (["a red circle"],))
    assert (found == expected).all()


def test_options_travel(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    pair = load(bundle.name, precision="fp32", threads=2, max_pixels=1000, providers="cpu")
    monkeypatch.chdir("/")
    for again in (pickle.loads(pickle.dumps(pair)), copy.copy(pair), copy.deepcopy(pair)):
        assert type(again) is EncoderPair
        assert (again.precision, again.threads, again.max_pixels, again.providers) == ("fp32", 2, 1000, ("cpu",))
        assert again.identity == pair.identity
        assert (again.encode_ids(IDS) == pair.encode_ids(IDS)).all()


def test_another_bundle_in_its_place_is_refused(bundle: Path) -> None:
    sent = pickle.dumps(load(bundle))
    manifest = bundle / "vlm_export.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": "other"}), encoding="utf-8")
    with pytest.raises(InputError, match="was replaced since it was opened"):
        pickle.loads(sent)
    shutil.rmtree(bundle)
    with pytest.raises(InputError, match="no bundle here"):
        pickle.loads(sent)


def test_a_graph_that_changed_is_found_in_the_worker(bundle: Path) -> None:
    pair = load(bundle)
    pair.encode_ids(IDS)
    sent = pickle.dumps(pair)
    graph = bundle / "onnx" / "text_model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    arrived = pickle.loads(sent)
    with pytest.raises(InputError, match="not the one that was exported"):
        arrived.encode_ids(IDS)
