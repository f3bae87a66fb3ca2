"""An opened bundle goes to workers as its path and options, and is checked again where it arrives."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlm_export import load
from vlm_export.errors import InputError
from vlm_export.runtime.session import Session

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
        session = again.session
        assert type(session) is Session
        assert (session.precision, session.threads, session.max_pixels) == ("fp32", 2, 1000)
        assert session.providers == ("cpu",)
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


def test_a_session_alone_travels_after_use(tiny_bundle: Path) -> None:
    session = load(tiny_bundle, threads=1).session
    ids = session.tokenizer.encode(["a cat"])
    expected = session.run("text", {"input_ids": ids})["text_embeds"]
    again = pickle.loads(pickle.dumps(session))
    assert (again.run("text", {"input_ids": ids})["text_embeds"] == expected).all()
    assert again.identity == session.identity


def test_threads_open_a_graph_and_a_tokenizer_once(tiny_bundle: Path) -> None:
    session = load(tiny_bundle, threads=1).session
    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(session.engine, ["text", "vision"] * 8))
        tokenizers = list(pool.map(session.tokenizer_up_to, [5, 9] * 8))
    assert len(set(map(id, engines))) == len(set(map(id, tokenizers))) == 2


def test_a_part_that_is_missing_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="has no part 'decoder'"):
        load(tiny_bundle).session.engine("decoder")


def test_a_tokenizer_is_never_longer_than_the_context(tiny_bundle: Path) -> None:
    session = load(tiny_bundle).session
    assert session.tokenizer_up_to(5).spec.context_length == 5
    assert session.tokenizer_up_to(10**6) is session.tokenizer


def test_a_session_for_workers_is_kept(tiny_bundle: Path) -> None:
    session, alone = (load(tiny_bundle, threads=threads).session for threads in (2, 1))
    workers = session.for_workers(2)
    assert workers.threads == 1
    assert session.for_workers(2) is workers
    assert alone.for_workers(1) is alone
