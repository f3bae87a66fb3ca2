"""The limits that a comparison must keep, per precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlm_export.bundle.manifest import Manifest, VariantRecord
from vlm_export.errors import InputError
from vlm_export.proof.metrics import Comparison
from vlm_export.specs.codec import Spec


@dataclass(frozen=True)
class Gate(Spec):
    """Limits for each output at each point.

    Attributes:
        name: the precision that the limits are for.
        max_abs_relative: limit of the largest absolute difference, as a multiple of max(1, max |reference|); None
            where the precision promises none.
        cosine: smallest cosine of any row.
        norm_ratio_min, norm_ratio_max: limits of the ratio of norms of any row: the cosine is blind to scale, and the
            absolute limit is lax for outputs far below 1.
    """

    name: str
    max_abs_relative: float | None
    cosine: float
    norm_ratio_min: float
    norm_ratio_max: float


GATES: Mapping[str, Gate] = {
    "fp32": Gate("fp32", 1e-4, 0.99999, 0.999, 1.001),
    "fp16": Gate("fp16", None, 0.999, 0.98, 1.02),
    # A pixel that the graph computes may round to its neighbour value.
    "preprocessing": Gate("preprocessing", None, 0.9999, 0.99, 1.01),
}
PIXELS_FROM_UINT8 = "pixels_from_uint8"
"""What a package calls the preparation of images alone."""
# Parts whose float32 graph is judged by a gate of its own; that of another precision is laxer already.
PART_GATES: Mapping[str, str] = dict.fromkeys(("vision_from_uint8", PIXELS_FROM_UINT8), "preprocessing")


# Precisions that the project's own limits judge; others are held to the budget that they were published with.
_JUDGED = ("fp32", "fp16")
# A budget's key, and what the norms of a row may be beside it.
_COSINE, _QUANTISED_NORMS = "cosine", (0.75, 1.33)


def variant_gate(part: str, variant: VariantRecord) -> Gate:
    """The limits of a variant: its precision's, or of a quantised one those of the budget that it was published with.

    Raises:
        InputError: a quantised variant states no budget, or none of the cosine.
    """
    # A loss of what is judged by the project's own limits would only loosen them.
    if variant.precision in _JUDGED:
        return GATES[gate_name(part, variant.precision)]
    budget = {} if variant.loss is None else variant.loss.budget
    if _COSINE not in budget:
        raise InputError(
            f"the manifest states no budget for the variant {variant.precision!r} of part {part!r}",
            where=variant.file,
            expected="what it loses, and the least cosine that it is held to",
            got="none" if variant.loss is None else f"a budget of {', '.join(budget) or 'nothing'}",
            fix="do not use this variant; quantize the bundle again",
        )
    return Gate(variant.precision, None, budget[_COSINE], *_QUANTISED_NORMS)


def laxest_variant(manifest: Manifest, precision: str) -> VariantRecord:
    """Of the variants that run where that precision is asked for, the one of the widest limits: those of what several
    parts compute together.

    Raises:
        InputError: as `variant_gate`.
    """
    variants = [part.served_by(precision) for part in manifest.parts if part.name not in PART_GATES]
    return min(variants, key=lambda variant: variant_gate("", variant).cosine)


def gate_name(part: str, precision: str) -> str:
    """Which of `GATES` judges that variant."""
    return PART_GATES.get(part, precision) if precision == "fp32" else precision


def judge(comparison: Comparison, gate: Gate) -> list[str]:
    """What the comparison breaks, one phrase each with expected and got; empty: it passes.

    Every condition is written as `not (good)`, so that NaN fails.
    """
    if not comparison.shape_equal:
        return [f"shape: expected {comparison.reference_type}, got {comparison.candidate_type}"]
    failures = []
    if not comparison.dtype_equal:
        failures.append(f"dtype: expected {comparison.reference_type}, got {comparison.candidate_type}")
    if not comparison.reference_finite:
        failures.append("the reference itself holds NaN or infinity: nothing can be shown at this point")
    if not comparison.candidate_finite:
        failures.append("finite: expected finite values, got NaN or infinity (overflow)")
    return failures + _judge_numbers(comparison, gate)


def _judge_numbers(comparison: Comparison, gate: Gate) -> list[str]:
    failures = []
    if gate.max_abs_relative is not None:
        limit = gate.max_abs_relative * max(1.0, comparison.max_reference_abs)
        if not (comparison.max_abs <= limit):
            failures.append(f"max-abs: expected at most {limit:.3g}, got {comparison.max_abs:.3g}")
    if not (comparison.cosine >= gate.cosine):
        failures.append(f"cosine: expected at least {gate.cosine:g}, got {comparison.cosine:.6g}")
    if not (gate.norm_ratio_min <= comparison.norm_ratio_min and comparison.norm_ratio_max <= gate.norm_ratio_max):
        expected = f"{gate.norm_ratio_min:g} to {gate.norm_ratio_max:g}"
        got = f"{comparison.norm_ratio_min:.4g} to {comparison.norm_ratio_max:.4g}"
        failures.append(f"norm ratio: expected {expected}, got {got}")
    return failures
