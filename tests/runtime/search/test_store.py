"""Embedding files come back as written, refuse what does not belong together, and the nearest rows are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.search.store import (
    EmbeddingsMeta,
    npy_metadata,
    read_embeddings,
    staged_embeddings,
    top_k,
    write_embeddings,
)

META = EmbeddingsMeta(kind="image", model="tiny", identity="0" * 64)
ITEMS = ["a.png", "dir/ü \n.png", "日本.jpg"]


def unit_vectors(count: int, seed: int = 0) -> FloatArray:
    rows = np.random.default_rng(seed).standard_normal((count, 5))
    vectors: FloatArray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return vectors


@pytest.mark.parametrize("name", ["e.npy", "e.parquet", "E.NPY"])
def test_files_come_back_as_written(name: str, tmp_path: Path) -> None:
    path, vectors = tmp_path / name, unit_vectors(3)
    write_embeddings(path, ITEMS, vectors, META)
    with pytest.raises(UsageError, match="the output exists"):
        write_embeddings(path, ITEMS[:2], vectors[:2], META)
    assert read_embeddings(path).items == tuple(ITEMS)
    write_embeddings(path, ITEMS[:2], vectors[:2], META, overwrite=True)
    embeddings = read_embeddings(path)
    assert embeddings.items == tuple(ITEMS[:2])
    assert embeddings.meta == META
    assert embeddings.vectors.dtype == np.float32
    assert np.array_equal(embeddings.vectors, vectors[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def write_half(path: Path) -> None:
    with staged_embeddings(path, overwrite=True) as staged:
        staged.write_text("half", encoding="utf-8")
        raise OSError("the disk is full")


@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
def test_files_of_like_names_are_left_alone(name: str, tmp_path: Path) -> None:
    others = [tmp_path / f"{name}.tmp", tmp_path / f".{name}.tmp"]
    for other in others:
        other.write_text("mine", encoding="utf-8")
    write_embeddings(tmp_path / name, ITEMS, unit_vectors(3), META)
    assert [other.read_text(encoding="utf-8") for other in others] == ["mine", "mine"]
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        write_half(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / name])
    assert len(read_embeddings(tmp_path / name).items) == 3


def test_the_longest_name_has_room_for_a_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 123 + ".npy")
    write_embeddings(path, ITEMS, unit_vectors(3), META)
    assert read_embeddings(path).items == tuple(ITEMS)


@pytest.mark.parametrize("name", ["x" * 300 + ".npy", "absent.npy", "."])
def test_files_that_cannot_be_looked_at_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no embeddings"):
        read_embeddings(tmp_path / name)


@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
def test_no_items_are_a_valid_file(name: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / name, [], unit_vectors(0), META)
    assert read_embeddings(tmp_path / name).vectors.shape == (0, 5)


def test_other_tools_can_read_the_files(tmp_path: Path) -> None:
    import pyarrow.parquet

    vectors = unit_vectors(3)
    write_embeddings(tmp_path / "e.npy", ITEMS, vectors, META)
    write_embeddings(tmp_path / "e.parquet", ITEMS, vectors, META)
    assert np.array_equal(np.load(tmp_path / "e.npy"), vectors)
    assert np.array_equal(np.load(tmp_path / "e.npy", mmap_mode="r"), vectors)
    with (tmp_path / "e.npy").open("rb") as file:
        assert np.array_equal(np.load(file), vectors)
        data = json.loads(np.load(file).tobytes())
    assert data == npy_metadata(tmp_path / "e.npy")
    assert data["items"] == ITEMS
    rows = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pylist()
    assert [row["item"] for row in rows] == ITEMS
    assert np.allclose([row["embedding"] for row in rows], vectors)


def test_paths_that_are_no_unicode(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.npy", ["\udcff.png"], unit_vectors(1), META)
    assert read_embeddings(tmp_path / "e.npy").items == ("\udcff.png",)
    import pyarrow.parquet

    items = ["a.png", "caf\udce9.png", "é.png"]
    write_embeddings(tmp_path / "e.parquet", items, unit_vectors(3), META)
    assert read_embeddings(tmp_path / "e.parquet").items == tuple(items)
    shown = pyarrow.parquet.read_table(tmp_path / "e.parquet").column("item").to_pylist()
    assert shown == ["a.png", "caf\ufffd.png", "é.png"]
    with pytest.raises(InputError, match="Unicode"):
        write_embeddings(tmp_path / "texts.parquet", ["\ud800"], unit_vectors(1), META)


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.npy or \.parquet"):
        write_embeddings(tmp_path / "e.csv", ITEMS, unit_vectors(3), META)
    with pytest.raises(UsageError, match="one vector per item"):
        write_embeddings(tmp_path / "e.npy", ITEMS, unit_vectors(2), META)
    with pytest.raises(InputError, match="no such file"):
        read_embeddings(tmp_path / "absent.npy")
    with pytest.raises(EnvironmentFailure):
        write_embeddings(tmp_path / "absent" / "e.npy", ITEMS, unit_vectors(3), META)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install '\.\[parquet\]' -c constraints\.txt"):
        write_embeddings(tmp_path / "e.parquet", ITEMS, unit_vectors(3), META)


def rewrite(path: Path, vectors: np.ndarray, metadata: bytes) -> None:
    """A `.npy` of two arrays, as `embed` writes."""
    with path.open("wb") as file:
        np.save(file, vectors)
        np.save(file, np.frombuffer(metadata, np.uint8))


def test_vectors_of_another_run_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    write_embeddings(path, ITEMS, unit_vectors(3), META)
    rewrite(path, unit_vectors(3, seed=1), json.dumps(npy_metadata(path)).encode())
    with pytest.raises(InputError, match="do not belong together"):
        read_embeddings(path)


def test_vectors_alone_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", unit_vectors(3))
    with pytest.raises(InputError, match="do not name their items") as caught:
        read_embeddings(tmp_path / "e.npy")
    assert caught.value.got == "one array"
    (tmp_path / "e.npy.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        read_embeddings(tmp_path / "e.npy")
    assert "older version" in caught.value.got


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"items": [1]}', "[" * 100_000, '{"items": "abc"}', "\0"])
def test_damaged_metadata_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    rewrite(path, unit_vectors(3), content.encode())
    with pytest.raises(InputError, match=r"e\.npy"):
        read_embeddings(path)


@pytest.mark.parametrize(("field", "value"), [("kind", "sound"), ("identity", None), ("schema_version", 2)])
def test_unknown_metadata_is_refused(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    write_embeddings(path, ITEMS, unit_vectors(3), META)
    rewrite(path, unit_vectors(3), json.dumps({**npy_metadata(path), field: value}).encode())
    with pytest.raises(InputError, match=field) as caught:
        read_embeddings(path)
    assert caught.value.fix == "embed again with this version"


@pytest.mark.parametrize("kept", [1, 9, 100, 187, 188, 189, 300, -1])
def test_a_file_that_was_cut_off_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    write_embeddings(path, ITEMS, unit_vectors(3), META)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"cannot be read|do not name their items"):
        read_embeddings(path)


def header(text: str) -> bytes:
    """The beginning of a `.npy` whose header is `text`."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


HEADERS = ["((((", "[" * 5000, "{'descr': ", "1", "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2,)}"]
HEADERS += [f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 60}, 5)}}", "\xff" * 50, "-" * 9000]


@pytest.mark.parametrize("content", [b"PK\003\004", b"PK\003\004" + bytes(99), *map(header, HEADERS)])
def test_odd_headers_are_an_input_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.npy").write_bytes(content + bytes(64))
    with pytest.raises(InputError, match="cannot be read"):
        read_embeddings(tmp_path / "e.npy")


@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00", b"PAR1PAR1"])
def test_damaged_vectors_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    write_embeddings(path, ITEMS, unit_vectors(3), META)
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        read_embeddings(path)


def test_pickled_arrays_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    write_embeddings(path, ITEMS, unit_vectors(3), META)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_embeddings(path)


@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
def test_values_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    vectors = unit_vectors(3)
    vectors[1, 2] = np.nan
    write_embeddings(tmp_path / name, ITEMS, vectors, META)
    with pytest.raises(InputError, match="NaN"):
        read_embeddings(tmp_path / name)


def test_foreign_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"item": ["a"], "embedding": ["b"]}), tmp_path / "e.parquet")
    with pytest.raises(InputError, match="vlm-export embed"):
        read_embeddings(tmp_path / "e.parquet")


def test_another_model_s_embeddings_are_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.npy", ITEMS, unit_vectors(3), META)
    embeddings = read_embeddings(tmp_path / "e.npy")
    embeddings.require_model("0" * 64, "tiny")
    with pytest.raises(InputError, match="another model") as caught:
        embeddings.require_model("1" * 64, "other")
    assert caught.value.exit_status == 3


@pytest.mark.parametrize("k", [1, 3, 50, 80])
def test_top_k_equals_a_full_sort(k: int) -> None:
    vectors, query = unit_vectors(50), unit_vectors(1, seed=9)[0]
    rows, scores = top_k(query, vectors, k)
    expected = np.argsort(-(vectors @ query), kind="stable")[:k]
    assert rows.tolist() == expected.tolist()
    assert np.array_equal(scores, (vectors @ query)[expected])


def test_equal_scores_come_in_row_order() -> None:
    vectors = np.repeat(unit_vectors(1), 6, axis=0)
    assert top_k(vectors[0], vectors, 4)[0].tolist() == [0, 1, 2, 3]


def test_top_k_refuses_odd_calls() -> None:
    with pytest.raises(UsageError):
        top_k(unit_vectors(1)[0], unit_vectors(3), 0)
    with pytest.raises(UsageError):
        top_k(unit_vectors(1)[0, :4], unit_vectors(3), 1)
    assert len(top_k(unit_vectors(1)[0], unit_vectors(0), 3)[0]) == 0
