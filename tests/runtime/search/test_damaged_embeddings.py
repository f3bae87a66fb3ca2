"""Files of embeddings that are damaged, and graphs that return what the manifest does not state, are bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_export import load
from vlm_export.errors import InputError
from vlm_export.runtime.search.index import SearchIndex
from vlm_export.runtime.search.store import EmbeddingsMeta, read_embeddings, write_embeddings

META = EmbeddingsMeta("text", "tiny", "0" * 64)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "x.npy"
    write_embeddings(path, ["a"], np.full((1, 4), 0.5, np.float32), META)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PK\x03\x04" + bytes(40),
        npy_header("(" * 4000),
        npy_header("-" * 9000 + "1"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000, 4), }\n"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }\n"),
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4), }\n") + bytes(32),
        npy_header("[]"),
    ],
    ids=["empty", "text", "zip", "brackets", "signs", "huge", "negative", "objects", "list"],
)
def test_arrays_that_are_none(written: Path, content: bytes) -> None:
    written.write_bytes(content)
    with pytest.raises(InputError, match="the embeddings cannot be read") as caught:
        read_embeddings(written)
    assert caught.value.where == str(written)


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"x"])
def test_arrays_of_another_length(written: Path, change: Callable[[bytes], bytes]) -> None:
    written.write_bytes(change(written.read_bytes()))
    with pytest.raises(InputError, match="cannot be read"):
        read_embeddings(written)


@pytest.mark.parametrize("metadata", ["[" * 100_000, "[]", "{", "null", '{"schema_version": 1}'])
def test_parquet_that_says_nonsense(tmp_path: Path, metadata: str) -> None:
    table = pa.table({"item": ["a"], "embedding": pa.array([[0.5] * 4], pa.list_(pa.float32(), 4))})
    pq.write_table(table.replace_schema_metadata({b"vlm_export": metadata}), tmp_path / "x.parquet")
    with pytest.raises(InputError):
        read_embeddings(tmp_path / "x.parquet")


def test_vectors_of_another_size_than_the_query(written: Path) -> None:
    with pytest.raises(InputError, match="another size"):
        SearchIndex.of(read_embeddings(written)).search(np.ones(5, np.float32), 1)


@pytest.mark.needs_torch
def test_a_graph_of_another_width_than_the_manifest_states(data: Path, tmp_path: Path) -> None:
    """The width is no axis of the graph, so that nothing knows it before it runs."""
    import onnx
    from onnx import TensorProto, helper

    bundle = Path(shutil.copytree(data / "runtime" / "tiny_bundle", tmp_path / "pair"))
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["text_embeds"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [value("text_embeds", TensorProto.FLOAT, ["batch", "width"])],
        [helper.make_tensor("table", TensorProto.FLOAT, [525, 7], [1.0] * (525 * 7))],
    )
    path = bundle / "onnx" / "text_model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    manifest: dict[str, Any] = json.loads((bundle / "vlm_export.json").read_text(encoding="utf-8"))
    raw = path.read_bytes()
    listed = {"size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest["files"]["onnx/text_model.onnx"] = listed
    (bundle / "vlm_export.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError):
        load(bundle).encode_ids([[1, 2, 524]])
