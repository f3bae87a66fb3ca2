"""A float16 graph as hardware computes it, against the Reference: an engine that computes in float32 hides overflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx_ir as ir

from vlm_export.export.options import FP16
from vlm_export.export.verification import PartVerification
from vlm_export.family import Reference
from vlm_export.precision.fp16_rounding import round_every_float16
from vlm_export.runtime.engines.onnxruntime import Engine
from vlm_export.verify.floor import FloorJudge
from vlm_export.verify.grid import least_grid
from vlm_export.verify.points import Arrays, PointResult, judge_point

_SUFFIX = ".rounded.onnx"


def rounded_points(
    path: Path,
    start: Callable[[Path], Engine],
    verification: PartVerification,
    reference: Reference,
    floor: FloorJudge | None,
) -> tuple[PointResult, ...]:
    """The graph with every float16 value rounded, at the points of the golden records and at the samples.

    A huge part at the points of its grid, where the Reference's outputs are known.

    Args:
        start: opens a graph file in an engine.
        floor: the variant's.
    """
    part, gate = verification.part, verification.gate(FP16)
    points = least_grid(part.signature) if verification.is_huge else verification.golden_points()
    examples = [(point.seed, part.examples(point.sizes, point.seed)) for point in points]
    cases: list[tuple[int | None, Arrays, Arrays, FloorJudge | None]] = [
        (n, inputs, inputs, floor) for n, inputs in examples
    ]
    cases += [(None, s.reference_inputs, s.inputs, floor if s.same_for_both else None) for s in verification.samples]
    with _rounded_copy(path) as copy:
        run = start(copy).run
        return tuple(
            judge_point(
                "rounded",
                part.signature,
                inputs,
                partial(reference, expected),
                partial(run, inputs),
                gate,
                seed=seed,
                floor=noise,
            )
            for seed, expected, inputs, noise in cases
        )


@contextmanager
def _rounded_copy(path: Path) -> Iterator[Path]:
    """A graph beside the other, which refers to the same file of weights."""
    copy = path.with_name(path.name + _SUFFIX)
    model = ir.load(path)
    round_every_float16(model)
    ir.save(model, copy)
    try:
        yield copy
    finally:
        copy.unlink()
