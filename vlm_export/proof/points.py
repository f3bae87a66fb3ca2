"""One point of a verification: what was run, how far the outputs are apart, and what that breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlm_export.errors import EnvironmentFailure
from vlm_export.proof.floor import FloorJudge
from vlm_export.proof.gates import Gate, judge
from vlm_export.proof.metrics import Array, Comparison, Deviation, compare, describe_array, measure_deviation
from vlm_export.specs.signature import Signature, TensorSpec

Arrays = Mapping[str, Array]
EngineRun = Callable[[Arrays], Mapping[str, Array]]
"""Inputs of a part by name → its outputs by name: the `run` of an engine, or any other candidate."""
PointKind = Literal["grid", "sample", "rows_alone", "padding", "golden", "rounded", "unrounded"]
_MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True)
class Failure:
    """What one output breaks; `output` is "" where the point has no outputs to judge."""

    output: str
    text: str

    def __str__(self) -> str:
        return f"{self.output}: {self.text}" if self.output else self.text


@dataclass(frozen=True)
class PointResult:
    """Comparisons and failures at one point.

    Attributes:
        kind: "grid" and "sample" compare the engine with the Reference, "rows_alone" each row of a batch with the
            same row alone, "padding" padded with unpadded token ids, "golden" the engine with recorded outputs,
            "rounded" a float16 graph as hardware rounds it with the Reference, "unrounded" one in float32, with the
            weights that it had before they were rounded.
        sizes: axis name → size.
        seed: of the example inputs, or None.
        comparisons: output name → its comparison; absent where there was nothing to compare.
        deviations: output name → its deviation, where it was judged by a measured floor.
    """

    kind: PointKind
    sizes: Mapping[str, int]
    seed: int | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    deviations: Mapping[str, Deviation] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" seed={self.seed}"
        return " ".join([self.kind, *(f"{axis}={size}" for axis, size in self.sizes.items())]) + seed


def judge_point(
    kind: PointKind,
    signature: Signature,
    inputs: Arrays,
    expected: Callable[[], Arrays],
    got: Callable[[], Arrays],
    gate: Gate,
    *,
    seed: int | None = None,
    floor: FloorJudge | None = None,
) -> PointResult:
    """Computes both sides, compares every output of the signature and judges it by the gate and by its floor.

    An exception on either side is a failure of the point. What is this machine's fault (EnvironmentFailure,
    MemoryError) and interrupts go through.
    """
    sizes = sizes_from_inputs(signature, inputs)
    try:
        side = "the reference"
        left = expected()
        side = "the engine"
        right = got()
    except (EnvironmentFailure, MemoryError):
        raise
    except Exception as error:
        text = f"{side} failed: {type(error).__name__}: {str(error)[:_MAX_ERROR_CHARACTERS]}"
        return PointResult(kind, sizes, seed, failures=(Failure("", text),))
    comparisons: dict[str, Comparison] = {}
    deviations: dict[str, Deviation] = {}
    failures = [
        Failure(name, "the engine returned an output that the signature lacks") for name in _extra(signature, right)
    ]
    for tensor in signature.outputs:
        problem = _unusable(tensor, sizes, left, right)
        if problem:
            failures.append(Failure(tensor.name, problem))
            continue
        comparisons[tensor.name] = compare(left[tensor.name], right[tensor.name])
        failures += [Failure(tensor.name, text) for text in judge(comparisons[tensor.name], gate)]
        if floor is not None and comparisons[tensor.name].shape_equal:
            deviations[tensor.name] = measure_deviation(left[tensor.name], right[tensor.name])
    if floor is not None:
        broken = floor.judge(deviations, inputs)
        failures += [Failure(name, text) for name, texts in broken.items() for text in texts]
    return PointResult(kind, sizes, seed, comparisons, deviations, tuple(failures))


def sizes_from_inputs(signature: Signature, inputs: Arrays) -> dict[str, int]:
    """Axis name → size, as the inputs have it, in the signature's order."""
    found: dict[str, int] = {}
    for tensor in signature.inputs:
        for position, entry in enumerate(tensor.shape):
            if isinstance(entry, str):
                found.setdefault(entry, inputs[tensor.name].shape[position])
    return {axis.name: found[axis.name] for axis in signature.axes if axis.name in found}


def _extra(signature: Signature, outputs: Arrays) -> list[str]:
    return [name for name in outputs if name not in signature.output_names]


def _unusable(tensor: TensorSpec, sizes: Mapping[str, int], expected: Arrays, got: Arrays) -> str:
    """Why the output cannot be compared, or "": one side lacks it, or the reference contradicts the signature."""
    for side, outputs in (("the reference", expected), ("the engine", got)):
        if tensor.name not in outputs:
            return f"{side} returned no such output, only {', '.join(outputs) or 'nothing'}"
    reference = expected[tensor.name]
    # Axes that only outputs have keep the size that the reference gives them; its rank is compared all the same.
    open_axes = (entry for entry in tensor.shape if isinstance(entry, str) and entry not in sizes)
    given = dict(zip(tensor.shape, reference.shape, strict=False))
    stated = f"{tensor.dtype} {tensor.concrete_shape({**sizes, **{axis: given.get(axis, 0) for axis in open_axes}})}"
    if describe_array(reference) != stated:
        return f"the reference contradicts the signature: expected {stated}, got {describe_array(reference)}"
    return ""
