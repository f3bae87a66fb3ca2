from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from vlm_export.bundle.manifest import FileRecord, Manifest, PartRecord, SourceRecord, VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.family import Part, reference_from_module
from vlm_export.proof import golden
from vlm_export.proof.golden import GoldenRecord, golden_from_reference, golden_points, iterate_golden, write_golden
from vlm_export.proof.grid import point_bytes
from vlm_export.proof.metrics import Array
from vlm_export.proof.tensor_proto import bytes_from_tensor, tensor_from_bytes
from vlm_export.specs.signature import Axis, Signature, TensorSpec

DTYPES = st.sampled_from([np.dtype(name) for name in ("float32", "float16", "int64", "int32", "uint8", "bool")])
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
NAMES = st.text(st.characters(codec="utf-8"), max_size=40)


@given(ARRAYS, NAMES)
def test_the_encoding_is_the_onnx_package_s(array: Array, name: str) -> None:
    raw = bytes_from_tensor(array, name)
    theirs = onnx.TensorProto.FromString(raw)
    assert theirs.name == name
    read = numpy_helper.to_array(theirs)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    if name:
        assert raw == numpy_helper.from_array(array, name).SerializeToString()


@given(ARRAYS, NAMES)
def test_what_the_onnx_package_writes_is_read(array: Array, name: str) -> None:
    read_name, read = tensor_from_bytes(numpy_helper.from_array(array, name).SerializeToString(), "x.pb")
    assert read_name == name
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


def test_big_endian_arrays_are_written_little_endian() -> None:
    array = np.arange(5, dtype=">i8")
    np.testing.assert_array_equal(tensor_from_bytes(bytes_from_tensor(array, "x"), "x.pb")[1], array)


GOOD = bytes_from_tensor(np.arange(6, dtype=np.float32).reshape(2, 3), "x")


def _proto(**fields: object) -> bytes:
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[1])
    for name, value in fields.items():
        getattr(tensor, name).extend(value) if isinstance(value, list) else setattr(tensor, name, value)
    return bytes(tensor.SerializeToString())


def _external() -> bytes:
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return bytes(tensor.SerializeToString())


BAD = {
    "cut off": GOOD[:-1],
    "cut off in a number": GOOD[:3] + b"\x80",
    "one byte more": GOOD + b"\0",
    "no data type": b"\x08\x01\x4a\x04abcd",
    "an unknown data type": _proto(data_type=onnx.TensorProto.STRING, raw_data=b"abcd"),
    "typed data": _proto(float_data=[1.0]),
    "external data": _external(),
    "too little data": _proto(raw_data=b"abc"),
    "a negative size": _proto(dims=[-1], raw_data=b""),
    "an absurd size": _proto(dims=[2**40, 2**40], raw_data=b""),
    "an absurd size times zero": _proto(dims=[2**40, 2**40, 0], raw_data=b""),
    "an absurd rank": _proto(dims=[1] * 1000, raw_data=b"abcd"),
    "data twice": GOOD + b"\x4a\x00",
    "a bool that is two": bytes_from_tensor(np.array([True]), "x")[:-1] + b"\x02",
    "a wrong wire type": b"\x0d\0\0\0\0" + GOOD,
    "text": b"<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD.keys())
def test_a_malformed_file_is_refused(raw: bytes) -> None:
    with pytest.raises(InputError) as caught:
        tensor_from_bytes(raw, "golden/x.pb")
    assert "golden/x.pb" in caught.value.where


@given(st.binary(max_size=60), st.integers(0, len(GOOD)))
def test_arbitrary_bytes_give_a_tensor_or_an_input_error(noise: bytes, cut: int) -> None:
    for raw in (noise, GOOD[:cut] + noise, GOOD[:cut] + noise + GOOD[cut:]):
        with suppress(InputError):
            assert isinstance(tensor_from_bytes(raw, "x.pb")[1], np.ndarray)


def _opened(root: Path, part: Part) -> OpenBundle:
    files = {
        path.relative_to(root).as_posix(): FileRecord(
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in root.rglob("*.pb")
    }
    source = SourceRecord("x", "state_dict")
    parts = (PartRecord(part.name, part.signature, (VariantRecord("fp32", "model.onnx"),)),)
    return OpenBundle(root, Manifest("x", source, "clip", {}, None, None, (), parts, files=files), b"")


@pytest.fixture
def records(parts: dict[str, Part]) -> list[GoldenRecord]:
    part = parts["text"]
    return golden_from_reference(part, reference_from_module(part), golden_points(part.signature))


@pytest.mark.parametrize("name", ["vision", "text"])
def test_records_come_back_as_they_were_written(parts: dict[str, Part], tmp_path: Path, name: str) -> None:
    part = parts[name]
    records = golden_from_reference(part, reference_from_module(part), golden_points(part.signature))
    written = write_golden(tmp_path, name, records)
    assert f"golden/{name}/test_data_set_0/input_0.pb" in written
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pb")) == sorted(written)
    read = list(iterate_golden(_opened(tmp_path, part), name))
    assert len(read) == len(records) >= 2
    for left, right in zip(records, read, strict=True):
        for mine, theirs in ((left.inputs, right.inputs), (left.outputs, right.outputs)):
            assert list(mine) == list(theirs)
            for key in mine:
                np.testing.assert_array_equal(mine[key], theirs[key])


def test_the_records_hold_batches_one_and_two_and_few_rows(parts: dict[str, Part]) -> None:
    for part in parts.values():
        rows = [point.rows for point in golden_points(part.signature)]
        assert set(rows) == {1, 2}
        assert sum(rows) <= 8


def test_a_bundle_without_records_has_none(parts: dict[str, Part], tmp_path: Path) -> None:
    assert list(iterate_golden(_opened(tmp_path, parts["text"]), "text")) == []


def test_an_incomplete_record_is_refused(parts: dict[str, Part], tmp_path: Path, records: list[GoldenRecord]) -> None:
    write_golden(tmp_path, "text", records)
    (tmp_path / "golden/text/test_data_set_1/output_0.pb").unlink()
    with pytest.raises(InputError, match="incomplete"):
        list(iterate_golden(_opened(tmp_path, parts["text"]), "text"))


def test_a_changed_file_is_refused(parts: dict[str, Part], tmp_path: Path, records: list[GoldenRecord]) -> None:
    write_golden(tmp_path, "text", records)
    bundle = _opened(tmp_path, parts["text"])
    path = tmp_path / "golden/text/test_data_set_0/output_0.pb"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError):
        list(iterate_golden(bundle, "text"))


def test_a_huge_file_is_refused_before_it_is_read(
    parts: dict[str, Part], tmp_path: Path, records: list[GoldenRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_golden(tmp_path, "text", records)
    monkeypatch.setattr(golden, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match="too large"):
        list(iterate_golden(_opened(tmp_path, parts["text"]), "text"))


@pytest.mark.parametrize(
    "array",
    [np.zeros((1, 3, 1), np.int64), np.zeros((1, 3), np.int32)],
    ids=["rank", "dtype"],
)
def test_a_tensor_of_another_signature_is_refused(
    parts: dict[str, Part], tmp_path: Path, records: list[GoldenRecord], array: Array
) -> None:
    write_golden(tmp_path, "text", [GoldenRecord({"input_ids": array}, records[0].outputs)])
    with pytest.raises(InputError) as caught:
        list(iterate_golden(_opened(tmp_path, parts["text"]), "text"))
    assert caught.value.got.startswith("input_ids int")


def test_a_tensor_of_another_name_is_refused(
    parts: dict[str, Part], tmp_path: Path, records: list[GoldenRecord]
) -> None:
    write_golden(tmp_path, "text", [GoldenRecord({"tokens": records[0].inputs["input_ids"]}, records[0].outputs)])
    with pytest.raises(InputError, match="does not fit"):
        list(iterate_golden(_opened(tmp_path, parts["text"]), "text"))


def test_points_that_would_fill_the_bundle_are_not_recorded() -> None:
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    logits = TensorSpec("logits", "float32", ("batch", "sequence", 50_000))
    signature = Signature((ids,), (logits,), (Axis("batch"), Axis("sequence", 1, 512)))
    points = golden_points(signature)
    assert {point.sizes["sequence"] for point in points} == {1, 3, 64, 128}
    assert all(point_bytes(signature, point.sizes) <= 32 << 20 for point in points)
    huge = Signature((ids,), (replace(logits, shape=("batch", "sequence", 50_000_000)),), signature.axes)
    assert [point.sizes["sequence"] for point in golden_points(huge)] == [1]
