"""The oldest ONNX Runtime that loads a graph, from its opset, its IR version and its operators.

Every number below was measured: clip-demo's float32 graphs of the opsets 17, 18 and 23, and graphs of one operator of
each opset, were loaded in the releases 1.15.1, 1.16.3, 1.17.0, 1.17.3, 1.18.0, 1.18.1, 1.19.2, 1.20.0, 1.20.1,
1.21.0, 1.21.1, 1.22.0, 1.22.1, 1.23.0, 1.23.2, 1.24.1, 1.25.0 and 1.26.0 on Linux x86-64 (2026-11-29). A number is
the oldest of these that loads the graph.
"""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir as ir

Release: TypeAlias = tuple[int, int, int]

_OLDEST_MEASURED: Release = (1, 15, 1)
_BY_OPSET: tuple[tuple[int, Release], ...] = (
    (20, (1, 17, 0)),
    (21, (1, 18, 0)),
    (22, (1, 21, 0)),
    (23, (1, 23, 0)),
    (24, (1, 24, 1)),
    (26, (1, 25, 0)),
)
"""From this opset on, this release is needed."""
_BY_IR_VERSION: tuple[tuple[int, Release], ...] = ((10, (1, 18, 0)), (11, (1, 23, 0)), (12, (1, 24, 1)))
"""From this version of the file format on; 10 is what the dynamo back end writes."""
_ARG_MAX_OF_INT64: Release = (1, 20, 0)
"""ArgMax and ArgMin of int64, as in CLIP's text part."""


def oldest_onnxruntime(model: ir.Model) -> str:
    """The release, such as "1.23.0"."""
    opset, ir_version = model.opset_imports.get("", 0), model.ir_version
    needed = [
        _OLDEST_MEASURED,
        *(release for number, release in _BY_OPSET if opset >= number),
        *(release for number, release in _BY_IR_VERSION if ir_version >= number),
    ]
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    if any(_finds_places_in_int64(node) for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)):
        needed.append(_ARG_MAX_OF_INT64)
    return ".".join(map(str, max(needed)))


def _finds_places_in_int64(node: ir.Node) -> bool:
    """Whether it is an ArgMax or ArgMin of int64, or of something of an untold type."""
    if node.domain != "" or node.op_type not in ("ArgMax", "ArgMin") or node.inputs[0] is None:
        return False
    value, dtype = node.inputs[0], node.inputs[0].dtype
    made_by = value.producer()
    if dtype is None and made_by is not None and made_by.op_type == "Cast" and made_by.domain == "":
        dtype = ir.DataType(made_by.attributes["to"].as_int())
    return dtype in (None, ir.DataType.INT64)
