"""From a back end's raw graph to the published file: same function, fewer nodes, readable names, streamed weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxsim
from onnx import ModelProto

from vlm_export import __version__
from vlm_export.graph.core.interface import apply_signature
from vlm_export.graph.core.onnxruntime_session import run_in_onnxruntime
from vlm_export.graph.core.skeleton import attach_weights, detach_weights
from vlm_export.graph.passes import GraphPass
from vlm_export.graph.passes.cast_like import replace_cast_likes
from vlm_export.graph.passes.constant_fold import fold_constants
from vlm_export.graph.passes.fold_weights import fold_batch_norms, fold_weight_transposes
from vlm_export.specs.signature import Signature

# They turn MatMul and Add on (B, T, C) into Reshape, Gemm, Reshape: more nodes and no gain in any runtime.
_SKIPPED_OPTIMIZERS = ["fuse_matmul_add_bias_into_gemm"]
DEFAULT_THRESHOLD_BYTES = 64 << 20
# Smaller tensors stay in the graph file, where a reader and a simplifier see their values.
_INLINE_TENSOR_BYTES = 1024


def finish_graph(model: ir.Model, signature: Signature) -> ir.Model:
    """What every published graph gets, simplified or not.

    No traces of this machine, no products of weights alone, the Signature's interface.
    """
    _clear_traces(model)
    ir.passes.Sequential(
        GraphPass(fold_constants, evaluate=run_in_onnxruntime),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
    )(model)
    apply_signature(model, signature)
    model.producer_name, model.producer_version = "vlm-export", __version__
    model.graph.name = "main_graph"
    return model


def _clear_traces(model: ir.Model) -> None:
    passes.ClearMetadataAndDocStringPass()(model)
    # The pass leaves the model's own, where onnxsim notes its settings, and those of values.
    model.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
        value.metadata_props.clear()


def simplify_graph(model: ir.Model) -> ir.Model:
    """onnxsim on the graph without its weights, then our folds of weights; returns a new model.

    The weights never pass through a protobuf: memory does not grow with the model, and the 2 GB limit does not apply.
    """
    work = model.clone()
    replace_cast_likes(work)
    weights = detach_weights(work)
    proto: ModelProto = ir.to_proto(work)
    simplified, _ = onnxsim.simplify(proto, skipped_optimizers=_SKIPPED_OPTIMIZERS)
    result: ir.Model = ir.from_proto(simplified)
    attach_weights(result, weights)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(),
        GraphPass(fold_weight_transposes),
        GraphPass(fold_batch_norms),
        passes.RemoveUnusedNodesPass(),
    )(result)
    return result


def weights_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def write_graph(model: ir.Model, path: Path, threshold_bytes: int = DEFAULT_THRESHOLD_BYTES) -> list[Path]:
    """Writes `path`, and `path` + "_data" beside it when the weights exceed the threshold; returns both or one.

    The model itself is left as it was: its tensors still refer to where they came from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if weights_bytes(model) <= threshold_bytes:
        ir.save(model, path)
        return [path]
    data = path.with_name(path.name + "_data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_TENSOR_BYTES, max_workers=1)
    return [path, data]
