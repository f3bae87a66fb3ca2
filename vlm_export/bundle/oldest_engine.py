"""The oldest ONNX Runtime that loads a graph, from its opset, its IR version and its operators.

Every number below was measured: clip-demo's float32 graphs of the opsets 17, 18 and 23, and graphs of one operator of
each opset, were loaded in the releases 1.15.1, 1.16.3, 1.17.0, 1.17.3, 1.18.0, 1.18.1, 1.19.2, 1.20.0, 1.20.1,
1.21.0, 1.21.1, 1.22.0, 1.22.1, 1.23.0, 1.23.2, 1.24.1, 1.25.0 and 1.26.0 on Linux x86-64 (2026-11-29), and so were the
quantised graphs of the demo checkpoints from 1.16.3 to 1.24.1 (2026-12-01). A number is the oldest of these that loads
the graph.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from vlm_export.bundle.onnx_protobuf import Message

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
MICROSOFT_OPERATORS: dict[bytes, Release] = {b"MatMulNBits": (1, 16, 3), b"GatherBlockQuantized": (1, 20, 0)}
"""ONNX Runtime's own operators that quantised graphs have; of the first no older release was tried."""
EIGHT_BIT_BLOCKS: Release = (1, 22, 0)
"""MatMulNBits with weights of 8 bits."""

# Field numbers: onnx/onnx.proto (ONNX 1.23). The number of int64 is TensorProto.DataType's.
_IR_VERSION, _OPSET_IMPORT, _GRAPH, _FUNCTION = 1, 8, 7, 25
_OPSET_DOMAIN, _OPSET_NUMBER = 1, 2
_GRAPH_NODE, _FUNCTION_NODE = 1, 7
_INITIALIZER, _TENSOR_TYPE, _TENSOR_NAME = 5, 2, 8
_VALUES, _VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _ELEMENT_TYPE = (11, 12, 13), 1, 2, 1, 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_GRAPHS = 1, 3, (6, 11)
_INT64 = 7
_MICROSOFT = b"com.microsoft"
_ARG_OPERATORS = (b"ArgMax", b"ArgMin")


def oldest_onnxruntime(path: Path) -> tuple[str, int]:
    """The release ("1.23.0"), and the opset of ONNX that the graph imports; InputError when it is malformed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = Message(data, 0, len(data), str(path))
        ir_version = model.integer(_IR_VERSION) or 0
        own = (entry for entry in model.inner(_OPSET_IMPORT) if not entry.text(_OPSET_DOMAIN))
        opset = max((entry.integer(_OPSET_NUMBER) or 0 for entry in own), default=0)
        needed = [
            OLDEST_MEASURED,
            *(release for number, release in BY_OPSET if opset >= number),
            *(release for number, release in BY_IR_VERSION if ir_version >= number),
        ]
        if _finds_places_in_int64(model):
            needed.append(ARG_MAX_OF_INT64)
        needed += _of_own_operators(model)
    return ".".join(map(str, max(needed))), opset


def _of_own_operators(model: Message) -> Iterator[Release]:
    """What ONNX Runtime's own operators in the model's graph need."""
    for node in (node for graph in model.inner(_GRAPH) for node in graph.inner(_GRAPH_NODE)):
        operator = node.text(_NODE_OPERATOR)
        if node.text(_NODE_DOMAIN) == _MICROSOFT and operator in MICROSOFT_OPERATORS:
            yield MICROSOFT_OPERATORS[operator]
            if operator == b"MatMulNBits" and _attribute(node, b"bits") == 8:
                yield EIGHT_BIT_BLOCKS


def _finds_places_in_int64(model: Message) -> bool:
    """Whether an ArgMax or ArgMin, in whatever graph of the file, reads int64, or something of an untold type."""
    types: dict[bytes, int | None] = {}
    read: set[bytes] = set()
    pending = [(graph, _GRAPH_NODE) for graph in model.inner(_GRAPH)]
    pending += [(function, _FUNCTION_NODE) for function in model.inner(_FUNCTION)]
    while pending:
        graph, nodes = pending.pop()
        for node in graph.inner(nodes):
            for attribute in node.inner(_NODE_ATTRIBUTE):
                pending += [(inner, _GRAPH_NODE) for inner in attribute.inner(*_ATTRIBUTE_GRAPHS)]
            if node.text(_NODE_DOMAIN):
                continue
            if node.text(_NODE_OPERATOR) in _ARG_OPERATORS:
                read.update(node.texts(_NODE_INPUT)[:1])
            if node.text(_NODE_OPERATOR) == b"Cast":
                types.update(dict.fromkeys(node.texts(_NODE_OUTPUT), _cast_to(node)))
        if nodes == _GRAPH_NODE:
            types.update(_stated_types(graph))
    return any(types.get(name) in (None, _INT64) for name in read)


def _cast_to(node: Message) -> int | None:
    return _attribute(node, b"to")


def _attribute(node: Message, name: bytes) -> int | None:
    """The number that an attribute holds."""
    named = (entry for entry in node.inner(_NODE_ATTRIBUTE) if entry.text(_ATTRIBUTE_NAME) == name)
    return next((entry.integer(_ATTRIBUTE_INTEGER) for entry in named), None)


def _stated_types(graph: Message) -> dict[bytes, int | None]:
    """Element types of the graph's initializers, inputs, outputs and of the values that it describes."""
    types = {tensor.text(_TENSOR_NAME): tensor.integer(_TENSOR_TYPE) for tensor in graph.inner(_INITIALIZER)}
    for value in graph.inner(*_VALUES):
        for tensor in (tensor for kind in value.inner(_VALUE_TYPE) for tensor in kind.inner(_TYPE_TENSOR)):
            types[value.text(_VALUE_NAME)] = tensor.integer(_ELEMENT_TYPE)
    return types
