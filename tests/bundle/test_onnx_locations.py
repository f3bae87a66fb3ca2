from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vlm_export.bundle import onnx_protobuf
from vlm_export.bundle.onnx_locations import KNOWN_DOMAINS, check_graph
from vlm_export.bundle.onnx_protobuf import read_onnx
from vlm_export.errors import InputError


def message(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, prefix = len(content), bytearray(_varint(number << 3 | 2))
    return bytes(prefix + _varint(size)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def external_tensor(location: str, **entries: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def nested_graphs(depth: int, innermost: bytes) -> bytes:
    """A model whose graph holds an If whose branch holds an If …, `depth` times; protobuf itself stops at 100."""
    graph = innermost
    for _ in range(depth):
        attribute = message(1, b"then_branch") + message(6, graph)
        graph = message(1, message(4, b"If") + message(5, attribute))
    return message(7, graph)


def locations(model: bytes) -> set[str]:
    return {value for t in read_onnx(model, "test").tensors for key, value in t.external if key == "location"}


def test_field_numbers_are_those_of_onnx() -> None:
    types: dict[str, Any] = {
        "model": onnx.ModelProto,
        "training": onnx.TrainingInfoProto,
        "function": onnx.FunctionProto,
        "graph": onnx.GraphProto,
        "node": onnx.NodeProto,
        "attribute": onnx.AttributeProto,
        "sparse": onnx.SparseTensorProto,
        "tensor": onnx.TensorProto,
    }
    names = {cls.DESCRIPTOR.full_name: kind for kind, cls in types.items()}
    for kind, cls in types.items():
        fields = cls.DESCRIPTOR.fields
        children = {f.number: names[f.message_type.full_name] for f in fields if f.message_type is not None
                    and f.message_type.full_name in names}  # fmt: skip
        assert children == onnx_protobuf._CHILDREN.get(kind, {}), kind
    tensor = {field.name: field.number for field in onnx.TensorProto.DESCRIPTOR.fields}
    assert (tensor["external_data"], tensor["data_location"], tensor["raw_data"]) == (13, 14, 9)
    typed = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
    assert [tensor[name] for name in typed] == list(onnx_protobuf._TYPED_DATA)
    node = {field.name: field.number for field in onnx.NodeProto.DESCRIPTOR.fields}
    function = {field.name: field.number for field in onnx.FunctionProto.DESCRIPTOR.fields}
    assert onnx_protobuf._NAMES["node"] == (node["domain"], node["op_type"])
    assert onnx_protobuf._NAMES["function"] == (function["domain"], function["name"])


def test_locations_are_found_wherever_a_tensor_can_stand(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.graph.initializer.append(external_tensor("initializer"))
    model.graph.sparse_initializer.add(values=external_tensor("values"), indices=external_tensor("indices"))
    attributes = model.graph.node.add(op_type="Constant").attribute
    attributes.add(name="a", t=external_tensor("attribute"))
    attributes.add(name="b", tensors=[external_tensor("first"), external_tensor("second")])
    attributes.add(name="c").sparse_tensor.values.CopyFrom(external_tensor("sparse"))
    attributes.add(name="d").sparse_tensors.add(values=external_tensor("sparse list"))
    attributes.add(name="e").g.initializer.append(external_tensor("branch"))
    attributes.add(name="f").graphs.add().initializer.append(external_tensor("branches"))
    function = model.functions.add(name="f", domain="local")
    function.node.add(op_type="Constant").attribute.add(name="v", t=external_tensor("function"))
    function.attribute_proto.add(name="default", t=external_tensor("default"))
    model.training_info.add().algorithm.initializer.append(external_tensor("training"))
    expected = """attribute branch branches default first function indices initializer second sparse,training values"""
    tensors = read_onnx(model.SerializeToString(), "model.onnx").tensors
    locations = {value for tensor in tensors for name, value in tensor.external if name == "location"}
    assert locations == {*expected.replace("sparse,", "sparse ").split(), "sparse list"}


@pytest.mark.parametrize("depth", [1, 32, 200, 5000])
def test_locations_in_nested_graphs(depth: int) -> None:
    start = time.process_time()
    model = nested_graphs(depth, message(5, external_tensor("../secret").SerializeToString()))
    assert locations(model) == {"../secret"}
    assert time.process_time() - start < 10


@pytest.mark.parametrize("depth", [1, 32, 200])
def test_a_hidden_location_is_refused_at_any_depth(tmp_path: Path, depth: int) -> None:
    inner = message(5, external_tensor("other_data").SerializeToString())
    (tmp_path / "m.onnx").write_bytes(nested_graphs(depth, inner))
    with pytest.raises(InputError, match=r"names a data file that the manifest does not list[\s\S]*other_data"):
        check_graph(tmp_path, "m.onnx", {"m.onnx_data": 8})


def test_deeper_than_engines_read(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(nested_graphs(32, b""))
    check_graph(tmp_path, "m.onnx", {})
    (tmp_path / "m.onnx").write_bytes(nested_graphs(200, b""))
    with pytest.raises(InputError, match="nested deeper"):
        check_graph(tmp_path, "m.onnx", {})


def test_a_key_that_stands_twice_hides_nothing() -> None:
    """Parsers take the last of a repeated field; both are reported, whichever one an engine takes."""
    pair = message(1, b"x") + message(1, b"location") + message(2, b"good") + message(2, b"evil")
    model = message(7, message(5, message(13, pair)))
    assert locations(model) == {"good", "evil"}


def test_a_graph_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Parsers merge the two."""
    (tmp_path / "m.onnx").write_bytes(message(7, b"") * 2)
    with pytest.raises(InputError, match="several models"):
        check_graph(tmp_path, "m.onnx", {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x08\x0a", "holds no model"),
        (b"<!DOCTYPE html><html>", "not a well-formed ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a well-formed ONNX file"),
        (b"PK\x03\x04" + bytes(60), "not a well-formed ONNX file"),
        (message(7, message(5, b"\x0a\xff")), "not a well-formed ONNX file"),
        (b"\x80" * 20, "a number without end"),
        (b"\x3a\xff\xff\xff\xff\x0f", "are left"),
        (message(7, message(1, message(7, b"\xff\xff"))), "not UTF-8"),
        (message(7, message(1, message(7, b"a" * 5000))), "5000 bytes"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match=says):
        check_graph(tmp_path, "m.onnx", {})


def test_every_cut_of_a_graph_is_an_input_error_or_reads(graph_bytes: Callable[..., bytes]) -> None:
    whole = graph_bytes({"location": "d"})
    for length in range(len(whole)):
        with suppress(InputError):
            read_onnx(whole[:length], "test")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_an_input_error_or_read(content: bytes) -> None:
    with suppress(InputError):
        read_onnx(content, "test")


@pytest.mark.parametrize("domain", ["evil.custom", "ai.onnx.future"])
def test_unknown_domains_are_refused(tmp_path: Path, graph_bytes: Callable[..., bytes], domain: str) -> None:
    (tmp_path / "m.onnx").write_bytes(graph_bytes(domain=domain))
    with pytest.raises(InputError, match=f"unknown domain '{domain}'"):
        check_graph(tmp_path, "m.onnx", {})


def test_domains_of_functions_in_the_model_are_known(tmp_path: Path, graph_bytes: Callable[..., bytes]) -> None:
    model = onnx.load_from_string(graph_bytes(domain="local"))
    function = helper.make_function("local", "MatMul", ["a", "b"], ["c"], [], [helper.make_opsetid("", 18)])
    model.functions.append(function)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    check_graph(tmp_path, "m.onnx", {})
    for domain in KNOWN_DOMAINS:
        (tmp_path / "m.onnx").write_bytes(graph_bytes(domain=domain))
        check_graph(tmp_path, "m.onnx", {})


def test_operators_that_open_files_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../evil.so")
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="opens other files"):
        check_graph(tmp_path, "m.onnx", {})


@pytest.mark.parametrize("dtype", ["FLOAT", "DOUBLE", "INT64", "INT32", "UINT8", "BOOL", "FLOAT16", "UINT64", "STRING"])
@pytest.mark.parametrize("raw", [True, False])
def test_shapes_are_compared_with_inline_data(tmp_path: Path, dtype: str, raw: bool) -> None:
    kind = getattr(TensorProto, dtype)
    if dtype == "STRING":
        tensor = onnx.TensorProto(name="w", data_type=kind, dims=[300], string_data=[b"x"] * 300)
    else:
        array = onnx.numpy_helper.from_array(helper.tensor_dtype_to_np_dtype(kind).type(1).repeat(300), "w")
        values = onnx.numpy_helper.to_array(array)
        tensor = array if raw else helper.make_tensor("w", kind, [300], values)
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    check_graph(tmp_path, "m.onnx", {})
    for dims in ([301], [299], [2**62, 2**62], [-300], [-1, -300]):
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(dims)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match="shape does not fit"):
            check_graph(tmp_path, "m.onnx", {})
