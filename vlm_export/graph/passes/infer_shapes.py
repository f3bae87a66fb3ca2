"""Dtypes and shapes of values, inferred without losing what was known."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import Info, copy_of, infer
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
    before, failure = _known(model), None
    while True:
        copy, infos = copy_of(model), dict[ir.Value, Info]()
        try:
            infos = infer(copy.model, strict=False)
        except GraphError as error:
            failure = error.got
        for value in before:
            _learn(value, infos.get(copy.of(value), Info(None, None)))
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


def _learn(value: ir.Value, found: Info) -> None:
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
