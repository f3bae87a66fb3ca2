"""ONNX TensorProto files (`.pb`) written and read without the onnx package, so that a runtime machine can do it.

Only what ONNX's standard test data needs: dims, data_type, name and raw_data. Sources: onnx.proto (message
TensorProto, field numbers and DataType values) and the Protocol Buffers wire format.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np

from vlm_export.bundle.onnx_protobuf import read_tensor
from vlm_export.errors import InputError
from vlm_export.proof.metrics import Array

_MAX_RANK = 16
_MAX_VALUES = 1 << 31
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
        InputError: cut off, with data anywhere else (external data above all), an unknown data type, or dims that do
            not fit the data.
    """
    tensor = read_tensor(raw, 0, len(raw), where)
    if tensor.external or tensor.is_external or tensor.typed_elements or len(tensor.spans) > 1:
        raise _malformed(where, "dims, data_type, name and raw_data, once each", "other fields")
    if tensor.data_type not in _DTYPES:
        raise _malformed(where, f"a data_type of {', '.join(_DATA_TYPES)}", f"data_type {tensor.data_type}")
    dtype, dims = np.dtype(_DTYPES[tensor.data_type]).newbyteorder("<"), tensor.dims
    data = b"".join(raw[start:end] for start, end in tensor.spans)  # protobuf may leave an empty field out
    # Zeros do not count: numpy refuses the product of the other sizes even where the array is empty.
    if len(dims) > _MAX_RANK or min(dims, default=0) < 0 or math.prod(size or 1 for size in dims) > _MAX_VALUES:
        raise _malformed(where, f"at most {_MAX_RANK} dims and {_MAX_VALUES} values", f"dims {dims[: _MAX_RANK + 1]}")
    expected = math.prod(dims) * dtype.itemsize
    if len(data) != expected:
        raise _malformed(where, f"{expected} bytes for {dtype.name} {dims}", f"{len(data)} bytes")
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise _malformed(where, "bytes 0 and 1 for bool", "other bytes")
    # A copy: writable, and in this machine's byte order.
    return tensor.name, np.frombuffer(data, dtype).reshape(dims).astype(dtype.newbyteorder("="))


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
