"""Whatever follows from constants alone, computed once."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from vlm_export.graph.constant_fold import LIMIT_BYTES, fold_constants


def fold_all_constants(model: ir.Model, limit_bytes: int = LIMIT_BYTES) -> int:
    """Folds, in place, every node of the main graph whose inputs are all constant, in ONNX Runtime.

    Args:
        limit_bytes: of all folded values together, and of each value on the way to them.

    Returns:
        How many initializers took the place of nodes.
    """
    from vlm_export.graph.onnxruntime_session import run_in_onnxruntime

    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return fold_constants(model, run_in_onnxruntime, limit_bytes, everything=True)
