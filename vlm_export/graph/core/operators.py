"""What ONNX says of operators: whether they exist in a model's opset, and which attributes they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from vlm_export.errors import GraphError, suggestion
from vlm_export.graph.core.names import opset_imports_of


def checked_schema(model: ir.Model, root: ir.Graph, op_type: str, domain: str) -> onnx.defs.OpSchema | None:
    """Returns the operator's definition at the opset of the scope, or None where ONNX does not know the domain.

    Raises:
        GraphError: no such operator at this opset, or the domain is not imported.
    """
    imports = opset_imports_of(model, root)
    if any((entry.domain, entry.name) == (domain, op_type) for entry in model.functions.values()):
        return None
    if domain not in imports:
        raise GraphError(
            f"the model does not import the domain {domain!r}",
            expected=f"one of {sorted(imports)}",
            fix="add the opset import first",
        )
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == domain}
    if not known:
        return None
    if onnx.defs.has(op_type, imports[domain], domain):
        return onnx.defs.get_schema(op_type, imports[domain], domain)
    if op_type in known:
        since = onnx.defs.get_schema(op_type, domain).since_version
        raise GraphError(
            f"operator {op_type!r} does not exist at opset {imports[domain]}",
            got=f"the newest form is of opset {since}",
            fix="convert the model to another opset, or use another operator",
        )
    near = suggestion(op_type, sorted(known))
    raise GraphError(
        f"there is no operator {op_type!r} in domain {domain or 'ai.onnx'!r}",
        fix=near if near.startswith("did") else "see ONNX's list of operators",
    )


# Operators outside ONNX whose first output has the dtype and shape of their first input (onnxruntime 1.31,
# docs/ContribOperators.md).
LIKE_FIRST_INPUT = {
    ("com.microsoft", op_type)
    for op_type in (
        "BiasAdd", "BiasGelu", "BiasSoftmax", "FastGelu", "Gelu", "GroupNorm", "Inverse", "QuickGelu",
        "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    )
}  # fmt: skip


Array: TypeAlias = npt.NDArray[Any]
RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def evaluate(node: ir.Node, arrays: Sequence[Array | None], opset: int) -> list[Array] | None:
    """Returns what a node makes of these inputs in ONNX's reference implementation, which suits small tensors.

    Integers wrap in their dtype, as they do in a graph.

    Args:
        arrays: as many as the node has inputs; None for those that it leaves out.

    Returns:
        None where the implementation lacks the operator, or it refuses the inputs.
    """
    names = ["" if array is None else f"i{index}" for index, array in enumerate(arrays)]
    proto: onnx.NodeProto = ir.to_proto(node)
    proto.input[:] = names
    try:
        with np.errstate(all="ignore"):
            feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
            results = ReferenceEvaluator(proto, opsets={"": opset}).run(None, feeds)
    # It raises whatever numpy does.
    except Exception:
        return None
    return [np.asarray(result) for result in results if isinstance(result, np.ndarray | np.generic)]
