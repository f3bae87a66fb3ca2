"""Whatever follows from constants alone, computed once."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from vlm_export.graph.passes.constant_fold import GROWTH_BYTES, LIMIT_BYTES, Folded, fold_constants


def fold_all_constants(
    model: ir.Model, limit_bytes: int = LIMIT_BYTES, growth_bytes: int | None = GROWTH_BYTES
) -> Folded:
    """Folds, in place, every node of the main graph whose inputs are all constant, in ONNX Runtime.

    Nodes that quantise or dequantise stay, for engines look for them.

    Args:
        limit_bytes: of all folded values together, and of each value on the way to them.
        growth_bytes: how much more all folded values may take than the constants that they were computed from.
    """
    from vlm_export.graph.core.onnxruntime_session import run_in_onnxruntime

    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return fold_constants(model, run_in_onnxruntime, limit_bytes, everything=True, growth_bytes=growth_bytes)
