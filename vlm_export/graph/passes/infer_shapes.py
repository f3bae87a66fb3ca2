"""Dtypes and shapes of values, inferred without losing what was known."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from vlm_export.graph.core.inference import copy_of, skeleton_proto
from vlm_export.graph.core.names import defined_values, nested_graphs
from vlm_export.graph.core.operators import LIKE_FIRST_INPUT


@dataclass(frozen=True)
class Inferred:
    """How many values are better known than before, and what ONNX says where its inference failed as a whole."""

    dtypes: int
    shapes: int
    failure: str | None = None

    def __bool__(self) -> bool:
        return bool(self.dtypes or self.shapes)


def infer_shapes(model: ir.Model) -> Inferred:
    """Infers dtypes and shapes in the main graph and the graphs inside it, in place.

    Weights stay where they are: ONNX sees the graph without them, so size does not matter. A dtype, rank, fixed size or
    named axis that the model states is kept where inference cannot tell it. Where inference that follows the values of
    shapes fails, it runs without; behind operators that ONNX does not know, a short table of onnxruntime's own helps.
    onnx_ir's `ShapeInferencePass` knows nothing behind onnxruntime's own operators, and does not say why it failed.
    """
    before = _known(model)
    while True:
        inferred, failure = _inferred(model)
        _merge(model, inferred)
        if not _fill_like_first_input(model):
            break
    after = _known(model)
    changes = [(before[value], after[value]) for value in after]
    return Inferred(
        dtypes=sum(old[0] != new[0] for old, new in changes),
        shapes=sum(old[1] != new[1] for old, new in changes),
        failure=failure,
    )


def _known(model: ir.Model) -> dict[ir.Value, tuple[object, object]]:
    return {
        value: (value.dtype, None if value.shape is None else tuple(value.shape.dims))
        for graph in nested_graphs(model.graph)
        for value in defined_values(graph)
    }


def _inferred(model: ir.Model) -> tuple[ir.Model, str | None]:
    proto, failure = skeleton_proto(copy_of(model).model), None
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    # Inference raises exceptions of several classes, also for graphs that are right.
    # (Values of shapes that it cannot follow.)
    except Exception:
        try:
            inferred = onnx.shape_inference.infer_shapes(proto)
        except Exception as error:
            inferred, failure = proto, " ".join(str(error).split())
    found: ir.Model = ir.from_proto(inferred)
    return found, failure


def _merge(model: ir.Model, inferred: ir.Model) -> None:
    for graph, found in zip(nested_graphs(model.graph), nested_graphs(inferred.graph), strict=True):
        by_name = {value.name: value for value in defined_values(found)}
        for value in defined_values(graph):
            if value.name in by_name:
                _learn(value, by_name[value.name])


def _learn(value: ir.Value, found: ir.Value) -> None:
    if value.type is None:
        value.type = found.type
    if found.shape is None:
        return
    if value.shape is None:
        value.shape = found.shape
    elif len(value.shape) == len(found.shape):
        value.shape = ir.Shape([_better(old, new) for old, new in zip(value.shape, found.shape, strict=True)])


def _better(old: int | ir.SymbolicDim, new: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(old, int):
        return old
    return new if isinstance(new, int) or old.value is None else old


def _fill_like_first_input(model: ir.Model) -> bool:
    filled = False
    for graph in nested_graphs(model.graph):
        for node in graph:
            if (node.domain, node.op_type) not in LIKE_FIRST_INPUT or not node.inputs or node.inputs[0] is None:
                continue
            source, output = node.inputs[0], node.outputs[0]
            if output.shape is None and source.shape is not None:
                output.shape, filled = ir.Shape(source.shape.dims), True
            if output.type is None and source.type is not None:
                output.type, filled = source.type, True
    return filled
