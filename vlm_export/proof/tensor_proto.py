"""ONNX TensorProto files (`.pb`) written and read without the onnx package, so that a runtime machine can do it.

Only what ONNX's standard test data needs: dims, data_type, name and raw_data. Sources: onnx.proto (message
TensorProto, field numbers and DataType values) and the Protocol Buffers wire format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from vlm_export.bundle.onnx_protobuf import BYTES, VARINT, WireField, wire_fields
from vlm_export.errors import InputError
from vlm_export.proof.metrics import Array

_MAX_RANK = 16
_MAX_VALUES = 1 << 31
_MAX_NAME_BYTES = 1 << 12
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9
_DATA_TYPES = MappingProxyType({"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9, "float16": 10})
_DTYPES = MappingProxyType({code: dtype for dtype, code in _DATA_TYPES.items()})


def bytes_from_tensor(array: Array, name: str) -> bytes:
    """The TensorProto of an array whose dtype is one of a Signature's; KeyError for another dtype."""
    raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
    dims = b"".join(b"\x08" + _varint(size) for size in array.shape)
    data_type = b"\x10" + _varint(_DATA_TYPES[array.dtype.name])
    encoded_name = name.encode("utf-8")
    return dims + data_type + b"\x42" + _varint(len(encoded_name)) + encoded_name + b"\x4a" + _varint(len(raw)) + raw


def tensor_from_bytes(raw: bytes, where: str) -> tuple[str, Array]:
    """Name and array of a TensorProto.

    Raises:
        InputError: cut off, with another field (external data above all), an unknown data type, or dims that do not
            fit the data.
    """
    parsed = _Fields(raw, where)
    for item in wire_fields(raw, 0, len(raw), where):
        parsed.take(item)
    return parsed.name, parsed.array()


@dataclass
class _Fields:
    raw: bytes
    where: str
    dims: list[int] = field(default_factory=list)
    data_type: int | None = None
    name: str = ""
    raw_data: bytes | None = None

    def take(self, item: WireField) -> None:
        content = self.raw[item.start : item.end]
        if item.number == _DIMS and item.wire == VARINT and len(self.dims) < _MAX_RANK:
            self.dims.append(item.value)
        elif item.number == _DATA_TYPE and item.wire == VARINT and self.data_type is None:
            self.data_type = item.value
        elif item.number == _NAME and item.wire == BYTES and len(content) <= _MAX_NAME_BYTES:
            self.name = content.decode("utf-8", "replace")
        elif item.number == _RAW_DATA and item.wire == BYTES and self.raw_data is None:
            self.raw_data = content
        else:
            raise _malformed(self.where, f"dims (up to {_MAX_RANK}), data_type, name, raw_data", f"field {item.number}")

    def array(self) -> Array:
        if self.data_type is None or self.data_type not in _DTYPES:
            raise _malformed(self.where, f"a data_type of {', '.join(_DATA_TYPES)}", f"data_type {self.data_type}")
        dtype = np.dtype(_DTYPES[self.data_type]).newbyteorder("<")
        raw = self.raw_data or b""  # protobuf may leave an empty field out
        # Zeros do not count: numpy refuses the product of the other sizes even where the array is empty.
        if math.prod(size or 1 for size in self.dims) > _MAX_VALUES:
            raise _malformed(self.where, f"at most {_MAX_VALUES} values", f"dims {self.dims}")
        expected = math.prod(self.dims) * dtype.itemsize
        if len(raw) != expected:
            raise _malformed(self.where, f"{expected} bytes for {dtype.name} {self.dims}", f"{len(raw)} bytes")
        if dtype.kind == "b" and raw.strip(b"\0\1"):
            raise _malformed(self.where, "bytes 0 and 1 for bool", "other bytes")
        # A copy: writable, and in this machine's byte order.
        return np.frombuffer(raw, dtype).reshape(self.dims).astype(dtype.newbyteorder("="))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _malformed(where: str, expected: str, got: str) -> InputError:
    return InputError(
        "a golden tensor file is malformed",
        where=where,
        expected=expected,
        got=got,
        fix="the bundle is damaged or was changed; export the model again",
    )
