"""The protobuf wire format of an ONNX file, as far as the stored tensors and operators need it.

Field numbers: onnx/onnx.proto (ONNX 1.23). Works on a mapped file, without recursion, and skips tensor data, so that
the depth of nested graphs and the size of weights cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, overload

from vlm_export.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
_MAX_TEXT_BYTES = 4096
_SCAN_BYTES = 1 << 20
_CONTINUED = bytes(range(128, 256))

# Message type → field number → message type of that field.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
# Message type → field numbers of its domain and of its operator or function name.
_NAMES = {"node": (7, 4), "function": (10, 1)}
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_INITIALIZERS = 5
_TENSOR_EXTERNAL, _TENSOR_LOCATION_KIND = 13, 14
# float_data, int32_data, string_data, int64_data, double_data, uint64_data.
_TYPED_DATA = {4: FIXED32, 5: VARINT, 6: BYTES, 7: VARINT, 10: FIXED64, 11: VARINT}


class Buffer(Protocol):
    """Bytes, or a mapped file."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> bytes: ...


@dataclass(frozen=True)
class WireField:
    """A field: its number, wire type, varint value (else 0), and where its content starts and ends."""

    number: int
    wire: int
    value: int
    start: int
    end: int


@dataclass
class StoredTensor:
    """What an ONNX file says of one tensor.

    Attributes:
        name: as stored, cut to a readable length.
        dims, data_type: shape and the number of TensorProto.DataType.
        raw_bytes: size of `raw_data`, None when absent.
        typed_elements: number of elements in the typed data fields, all together.
        external: the entries of `external_data` in order; keys may repeat.
        is_external: whether `data_location` says EXTERNAL.
        is_initializer: it is one of the model's own graph, not of a node or of a nested graph.
        spans: where the bytes of `raw_data` and of the packed typed fields start and end, in order.
    """

    name: str = ""
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    raw_bytes: int | None = None
    typed_elements: int = 0
    external: list[tuple[str, str]] = field(default_factory=list)
    is_external: bool = False
    is_initializer: bool = False
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class OnnxContents:
    """Tensors, (domain, operator) of every node and (domain, name) of every function.

    `graphs` counts the model's own graphs, `depth` the messages inside each other, the model being 0.
    """

    tensors: list[StoredTensor] = field(default_factory=list)
    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    graphs: int = 0
    depth: int = 0


def read_onnx(data: Buffer, where: str) -> OnnxContents:
    """Everything in the model, nested graphs, functions and sparse tensors included.

    Raises:
        InputError: the bytes are not a well-formed protobuf message, or a name in them is not text.
    """
    found = OnnxContents()
    pending = [("model", 0, len(data), 0)]
    while pending:
        kind, start, end, depth = pending.pop()
        found.depth = max(found.depth, depth)
        if kind in ("tensor", "initializer"):
            found.tensors.append(_read_tensor(data, start, end, where))
            found.tensors[-1].is_initializer = kind == "initializer"
            continue
        children = _CHILDREN[kind]
        texts: dict[int, str] = {}
        for item in wire_fields(data, start, end, where):
            if item.wire == BYTES and item.number in children:
                is_own = kind == "graph" and depth == 1 and item.number == _INITIALIZERS
                pending.append(("initializer" if is_own else children[item.number], item.start, item.end, depth + 1))
                found.graphs += kind == "model" and item.number == 7
            elif item.wire == BYTES and item.number in _NAMES.get(kind, ()):
                texts[item.number] = _text(data, item, where)
        if kind in _NAMES:
            domain, name = (texts.get(number, "") for number in _NAMES[kind])
            (found.operators if kind == "node" else found.functions).add((domain, name))
    return found


def wire_fields(data: Buffer, start: int, end: int, where: str) -> Iterator[WireField]:
    """The fields of the message that lies in `data[start:end]`; InputError when it is malformed."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end, where)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _malformed(where, at, f"field number {number}")
        if wire == VARINT:
            value, at = _varint(data, at, end, where)
            yield WireField(number, wire, value, at, at)
            continue
        if wire == BYTES:
            size, at = _varint(data, at, end, where)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise _malformed(where, at, f"wire type {wire}")
        if size > end - at:
            raise _malformed(where, at, f"a field of {size} bytes where {end - at} are left")
        yield WireField(number, wire, 0, at, at + size)
        at += size


@dataclass(frozen=True)
class Message:
    """A message in a file, of which nothing is held: each question reads its fields again; InputError as above."""

    data: Buffer
    start: int
    end: int
    where: str

    def inner(self, *numbers: int) -> Iterator[Message]:
        """The messages in the fields of these numbers, in the order of the file."""
        for item in wire_fields(self.data, self.start, self.end, self.where):
            if item.wire == BYTES and item.number in numbers:
                yield Message(self.data, item.start, item.end, self.where)

    def integer(self, number: int) -> int | None:
        """The number in a field, None where it is not there; the last one counts."""
        fields = wire_fields(self.data, self.start, self.end, self.where)
        return next(reversed([item.value for item in fields if item.wire == VARINT and item.number == number]), None)

    def texts(self, number: int) -> list[bytes]:
        """The contents of a repeated field."""
        return [self.data[item.start : item.end] for item in self.inner(number)]

    def text(self, number: int) -> bytes:
        """The content of a field, empty where it is not there; the last one counts."""
        return next(reversed(self.texts(number)), b"")


def _varint(data: Buffer, at: int, end: int, where: str) -> tuple[int, int]:
    value, shift = 0, 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        shift += 7
    raise _malformed(where, at, "a number without end")


def _text(data: Buffer, item: WireField, where: str) -> str:
    if item.end - item.start > _MAX_TEXT_BYTES:
        raise _malformed(where, item.start, f"a name of {item.end - item.start} bytes")
    try:
        return data[item.start : item.end].decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed(where, item.start, "a name that is not UTF-8") from None


def _read_tensor(data: Buffer, start: int, end: int, where: str) -> StoredTensor:
    tensor = StoredTensor()
    for item in wire_fields(data, start, end, where):
        if item.number == _TENSOR_DIMS and item.wire in (VARINT, BYTES):
            tensor.dims += _integers(data, item, where)
        elif item.number == _TENSOR_TYPE and item.wire == VARINT:
            tensor.data_type = item.value
        elif item.number == _TENSOR_NAME and item.wire == BYTES:
            tensor.name = data[item.start : min(item.end, item.start + 200)].decode("utf-8", "replace")
        elif item.number == _TENSOR_RAW and item.wire == BYTES:
            tensor.raw_bytes = item.end - item.start
            tensor.spans.append((item.start, item.end))
        elif item.number == _TENSOR_EXTERNAL and item.wire == BYTES:
            tensor.external += _entries(data, item, where)
        elif item.number == _TENSOR_LOCATION_KIND and item.wire == VARINT:
            tensor.is_external = item.value == 1
        elif item.number in _TYPED_DATA:
            tensor.typed_elements += _count_elements(data, item)
            tensor.spans.append((item.start, item.end))
    return tensor


def _integers(data: Buffer, item: WireField, where: str) -> list[int]:
    """Signed 64-bit numbers of a repeated field, packed or single."""
    if item.wire == VARINT:
        return [_signed(item.value)]
    values, at = [], item.start
    while at < item.end:
        value, at = _varint(data, at, item.end, where)
        values.append(_signed(value))
    return values


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _entries(data: Buffer, item: WireField, where: str) -> list[tuple[str, str]]:
    """The pair in one StringStringEntryProto; with repeated keys or values, every combination of them."""
    texts: dict[int, list[str]] = {1: [], 2: []}
    for entry in wire_fields(data, item.start, item.end, where):
        if entry.number in texts and entry.wire == BYTES:
            texts[entry.number].append(_text(data, entry, where))
    return [(key, value) for key in texts[1] for value in texts[2] or [""]]


def _count_elements(data: Buffer, item: WireField) -> int:
    packed = _TYPED_DATA[item.number]
    if item.wire != BYTES or packed == BYTES:
        return 1
    if packed in _FIXED_SIZES:
        return (item.end - item.start) // _FIXED_SIZES[packed]
    # Each packed number ends with the one byte below 128.
    count = 0
    for at in range(item.start, item.end, _SCAN_BYTES):
        count += len(data[at : min(at + _SCAN_BYTES, item.end)].translate(None, _CONTINUED))
    return count


def _malformed(where: str, at: int, got: str) -> InputError:
    return InputError(
        "a graph is not a well-formed ONNX file",
        where=f"{where}, byte {at}",
        got=got,
        fix="it may be cut off or something else; copy the bundle again, or export again",
    )
