"""The oldest ONNX Runtime that loads a graph, from its opset, its IR version and its operators.

Measured with the releases 1.17.3 to 1.23.2 on graphs of this project: opsets up to 17 load from 1.17.3 on. IR version
10, which the dynamo back end writes, needs 1.18.1, an ArgMax over int64, as in CLIP's text part, 1.20.1, opset 22
needs 1.21.1, and opset 23 needs 1.23.2.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from vlm_export.bundle.onnx_wire import BYTES, VARINT, Buffer, read_onnx, wire_fields

_IR_VERSION, _OPSET_IMPORT = 1, 8
_OPSET_DOMAIN, _OPSET_NUMBER = 1, 2
_ANY = (1, 17, 3)
_BY_OPSET = ((23, (1, 23, 2)), (22, (1, 21, 1)))
_NEW_IR, _FOR_NEW_IR = 10, (1, 18, 1)
_ARG_MAX, _FOR_ARG_MAX = ("", "ArgMax"), (1, 20, 1)


def oldest_onnxruntime(path: Path) -> tuple[str, int]:
    """The version ("1.23.2"), and the opset of ONNX that the graph imports; InputError when it is malformed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        buffer: Buffer = data
        ir_version, opset = _versions(buffer, str(path))
        needed = [_ANY, *(version for number, version in _BY_OPSET if opset >= number)]
        if ir_version >= _NEW_IR:
            needed.append(_FOR_NEW_IR)
        if _ARG_MAX in read_onnx(buffer, str(path)).operators:
            needed.append(_FOR_ARG_MAX)
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
