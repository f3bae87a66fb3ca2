"""A graph's interface: made to carry the Signature's names and axes, and checked against it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_export.errors import VerificationError
from vlm_export.specs.signature import Signature, TensorSpec

# transformers.js 4.2 and later find a cache's batch by this name (`addPastKeyValues`), and take 0 for any other.
GRAPH_AXES = {"batch": "batch_size"}


def apply_signature(model: ir.Model, signature: Signature) -> None:
    """Writes the Signature's axes into the graph's inputs and outputs, named as hosts expect, in place.

    Raises:
        VerificationError: names, order, dtypes, ranks or fixed sizes differ: an input vanished, an axis became a
            constant, or the like.
    """
    pairs = (("input", model.graph.inputs, signature.inputs), ("output", model.graph.outputs, signature.outputs))
    for kind, values, specs in pairs:
        found, wanted = [value.name for value in values], [spec.name for spec in specs]
        if found != wanted:
            raise VerificationError(f"the graph's {kind}s are not the part's", expected=str(wanted), got=str(found))
        for value, spec in zip(values, specs, strict=True):
            _check_value(kind, value, spec)
            value.shape = ir.Shape(
                [GRAPH_AXES.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape]
            )


def _check_value(kind: str, value: ir.Value, spec: TensorSpec) -> None:
    shape = value.shape
    fits = shape is None or (len(shape) == len(spec.shape) and all(map(_axis_fits, shape, spec.shape)))
    if value.dtype != ir.DataType.from_numpy(np.dtype(spec.dtype)) or not fits:
        raise VerificationError(
            f"{kind} {spec.name} of the graph has another type than the part states",
            expected=f"{spec.dtype} {spec.shape}",
            got=f"{value.dtype} {shape}",
            fix="try the other exporter back end (--exporter)",
        )


def _axis_fits(found: int | ir.SymbolicDim, wanted: int | str) -> bool:
    # A symbolic axis in place of a fixed one only lost knowledge; a constant in place of a symbolic one is wrong.
    return found == wanted if isinstance(found, int) else True
