"""The oldest ONNX Runtime that loads a graph, from its opset, its IR version and its operators.

Every number below was measured: clip-demo's float32 graphs of the opsets 17, 18 and 23, and graphs of one operator of
each opset, were loaded in the releases 1.15.1, 1.16.3, 1.17.0, 1.17.3, 1.18.0, 1.18.1, 1.19.2, 1.20.0, 1.20.1,
1.21.0, 1.21.1, 1.22.0, 1.22.1, 1.23.0, 1.23.2, 1.24.1, 1.25.0 and 1.26.0 on Linux x86-64 (2026-11-29). A number is
the oldest of these that loads the graph.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from vlm_export.bundle.onnx_protobuf import BYTES, VARINT, Buffer, WireField, wire_fields

Release: TypeAlias = tuple[int, int, int]

OLDEST_MEASURED: Release = (1, 15, 1)
BY_OPSET: tuple[tuple[int, Release], ...] = (
    (20, (1, 17, 0)),
    (21, (1, 18, 0)),
    (22, (1, 21, 0)),
    (23, (1, 23, 0)),
    (24, (1, 24, 1)),
    (26, (1, 25, 0)),
)
"""From this opset on, this release is needed."""
BY_IR_VERSION: tuple[tuple[int, Release], ...] = ((10, (1, 18, 0)), (11, (1, 23, 0)), (12, (1, 24, 1)))
"""From this version of the file format on; 10 is what the dynamo back end writes."""
ARG_MAX_OF_INT64: Release = (1, 20, 0)
"""ArgMax and ArgMin of int64, as in CLIP's text part."""

# Field numbers: onnx/onnx.proto (ONNX 1.23). The number of int64 is TensorProto.DataType's.
_IR_VERSION, _OPSET_IMPORT, _GRAPH, _FUNCTION = 1, 8, 7, 25
_OPSET_DOMAIN, _OPSET_NUMBER = 1, 2
_GRAPH_NODE, _FUNCTION_NODE = 1, 7
_INITIALIZER, _TENSOR_TYPE, _TENSOR_NAME = 5, 2, 8
_VALUES = (11, 12, 13)
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_GRAPHS = 1, 3, (6, 11)
_INT64 = 7
_ARG_OPERATORS = (b"ArgMax", b"ArgMin")


def oldest_onnxruntime(path: Path) -> tuple[str, int]:
    """The release ("1.23.0"), and the opset of ONNX that the graph imports; InputError when it is malformed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        ir_version, opset = _versions(data, str(path))
        needed = [
            OLDEST_MEASURED,
            *(release for number, release in BY_OPSET if opset >= number),
            *(release for number, release in BY_IR_VERSION if ir_version >= number),
        ]
        if _finds_places_in_int64(data, str(path)):
            needed.append(ARG_MAX_OF_INT64)
    return ".".join(map(str, max(needed))), opset


def _versions(data: Buffer, where: str) -> tuple[int, int]:
    """IR version and opset of the model at wire level."""
    ir_version = opset = 0
    for item in wire_fields(data, 0, len(data), where):
        if item.number == _IR_VERSION and item.wire == VARINT:
            ir_version = item.value
        elif item.number == _OPSET_IMPORT and item.wire == BYTES:
            fields = list(wire_fields(data, item.start, item.end, where))
            named = any(field.number == _OPSET_DOMAIN and field.end > field.start for field in fields)
            numbers = [field.value for field in fields if field.number == _OPSET_NUMBER and field.wire == VARINT]
            opset = opset if named or not numbers else numbers[-1]
    return ir_version, opset


@dataclass
class _Names:
    """The element type of each tensor that the file tells, and the tensors that ArgMax and ArgMin read."""

    types: dict[bytes, int] = field(default_factory=dict)
    read: set[bytes] = field(default_factory=set)


def _finds_places_in_int64(data: Buffer, where: str) -> bool:
    """Whether an ArgMax or ArgMin, in whatever graph of the file, reads int64, or something of an untold type."""
    names = _Names()
    # (start, end, number of the field that holds nodes)
    pending = [
        (item.start, item.end, _GRAPH_NODE if item.number == _GRAPH else _FUNCTION_NODE)
        for item in wire_fields(data, 0, len(data), where)
        if item.wire == BYTES and item.number in (_GRAPH, _FUNCTION)
    ]
    while pending:
        start, end, nodes = pending.pop()
        for item in wire_fields(data, start, end, where):
            if item.wire != BYTES:
                continue
            if item.number == nodes:
                inner = _read_node(data, item, where, names)
                pending += [(graph.start, graph.end, _GRAPH_NODE) for graph in inner]
            elif nodes == _GRAPH_NODE and item.number == _INITIALIZER:
                _read_initializer(data, item, where, names)
            elif nodes == _GRAPH_NODE and item.number in _VALUES:
                _read_value(data, item, where, names)
    return any(names.types.get(name, _INT64) == _INT64 for name in names.read)


def _read_node(data: Buffer, node: WireField, where: str, names: _Names) -> list[WireField]:
    """Notes what an ArgMax reads and what a Cast makes; returns the graphs inside the node."""
    texts: dict[int, list[bytes]] = {}
    graphs: list[WireField] = []
    to = None
    for item in _messages(data, node, where):
        if item.number in (_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_DOMAIN):
            texts.setdefault(item.number, []).append(data[item.start : item.end])
        elif item.number == _NODE_ATTRIBUTE:
            for entry in wire_fields(data, item.start, item.end, where):
                if entry.wire == BYTES and entry.number in _ATTRIBUTE_GRAPHS:
                    graphs.append(entry)
            to = _integer_attribute(data, item, where, b"to") or to
    operator, inputs = texts.get(_NODE_OPERATOR, [b""])[-1], texts.get(_NODE_INPUT, [])
    if not any(texts.get(_NODE_DOMAIN, [])):
        if operator in _ARG_OPERATORS:
            names.read.update(inputs[:1])
        if operator == b"Cast" and to is not None:
            names.types.update(dict.fromkeys(texts.get(_NODE_OUTPUT, []), to))
    return graphs


def _integer_attribute(data: Buffer, attribute: WireField, where: str, name: bytes) -> int | None:
    fields = list(wire_fields(data, attribute.start, attribute.end, where))
    if not any(field.number == _ATTRIBUTE_NAME and data[field.start : field.end] == name for field in fields):
        return None
    numbers = [field.value for field in fields if field.number == _ATTRIBUTE_INTEGER and field.wire == VARINT]
    return numbers[-1] if numbers else None


def _read_initializer(data: Buffer, tensor: WireField, where: str, names: _Names) -> None:
    name, kind = b"", 0
    for item in wire_fields(data, tensor.start, tensor.end, where):
        if item.number == _TENSOR_NAME and item.wire == BYTES:
            name = data[item.start : item.end]
        elif item.number == _TENSOR_TYPE and item.wire == VARINT:
            kind = item.value
    names.types[name] = kind


def _read_value(data: Buffer, value: WireField, where: str, names: _Names) -> None:
    """A ValueInfoProto: its name (field 1), and of its type (2) the tensor's (1) element type (1)."""
    name = b""
    for item in _messages(data, value, where):
        if item.number == 1:
            name = data[item.start : item.end]
            continue
        for tensor in _messages(data, item, where) if item.number == 2 else ():
            for entry in wire_fields(data, tensor.start, tensor.end, where) if tensor.number == 1 else ():
                if entry.number == 1 and entry.wire == VARINT:
                    names.types[name] = entry.value


def _messages(data: Buffer, message: WireField, where: str) -> Iterator[WireField]:
    """The fields inside a message that are messages or texts themselves."""
    return (item for item in wire_fields(data, message.start, message.end, where) if item.wire == BYTES)
