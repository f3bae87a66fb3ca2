"""Two copies of a float16 graph show what an engine's run of it hides.

One rounds every float16 value as hardware does, since an engine that computes in float32 hides overflow. The other is
computed in float32 with the weights that were not rounded, since rounding hides faults that are smaller than itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import onnx_ir as ir

from vlm_export.exporting.finishing import write_graph
from vlm_export.exporting.ledger import original_of
from vlm_export.exporting.options import FP16, FP32
from vlm_export.family import Reference
from vlm_export.precision.fp16_rounding import round_every_float16, undo_rounding
from vlm_export.proof.floor import FloorJudge
from vlm_export.proof.grid import least_grid
from vlm_export.proof.points import Arrays, PointKind, PointResult, judge_point
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import Engine

if TYPE_CHECKING:
    from vlm_export.exporting.verification import PartVerification

_ROUNDED, _UNROUNDED = ".rounded.onnx", "unrounded.onnx"
StartEngine = Callable[[Path], Engine]
"""Opens a graph file in an engine."""
NOT_UNROUNDED = "the float16 graph in float32: "


def rounded_points(
    path: Path, start: StartEngine, verification: PartVerification, reference: Reference, floor: FloorJudge | None
) -> tuple[PointResult, ...]:
    """The graph with every float16 value rounded, beside the graph's file, whose weights it refers to.

    Args:
        floor: the float16 variant's.
    """
    copy = path.with_name(path.name + _ROUNDED)
    model = ir.load(path)
    round_every_float16(model)
    ir.save(model, copy)
    try:
        return _points("rounded", start(copy), verification, reference, FP16, floor)
    finally:
        copy.unlink()


def unrounded_report(
    path: Path,
    start: StartEngine,
    verification: PartVerification,
    reference: Reference,
    constants: Callable[[ir.Model], Mapping[str, ir.TensorProtocol]],
    *,
    engine_name: str,
    scratch: Path,
) -> PartReport | str:
    """The graph in float32 with the weights that were not rounded, by the gates and the floor of float32.

    Args:
        constants: of the graph, what initializers held that are no parameters, before they were rounded.
        scratch: a directory with room for the weights in float32.

    Returns:
        The report, or why there is none.
    """
    if verification.is_huge:
        return f"{NOT_UNROUNDED}its weights would be written a second time, which takes too long"
    model = ir.load(path)
    unknown = undo_rounding(model, original_of(verification.part, model, constants(model)))
    if unknown:
        return f"{NOT_UNROUNDED}what {', '.join(unknown[:3])} held before it was rounded is not recorded"
    with TemporaryDirectory(dir=scratch) as folder:
        copy = Path(folder) / _UNROUNDED
        # With a file of its own for all weights: those that are float32 anyhow would refer to the published one.
        write_graph(model, copy, 0)
        floor = verification.floor(reference, FP32)
        points = _points("unrounded", start(copy), verification, reference, FP32, floor)
    return PartReport(
        verification.part.name,
        f"{FP16} unrounded",
        verification.gate(FP32),
        points,
        verification.model.reference_name,
        engine_name,
        floor=None if floor is None else floor.floor,
    )


def _points(
    kind: PointKind,
    engine: Engine,
    verification: PartVerification,
    reference: Reference,
    precision: str,
    floor: FloorJudge | None,
) -> tuple[PointResult, ...]:
    """At the points of the golden records and at the samples; a huge part at those of its grid, where the Reference's
    outputs are known."""
    part, gate = verification.part, verification.gate(precision)
    points = least_grid(part.signature) if verification.is_huge else verification.golden_points()
    examples = [(point.seed, part.examples(point.sizes, point.seed)) for point in points]
    cases: list[tuple[int | None, Arrays, Arrays, FloorJudge | None]] = [
        (n, inputs, inputs, floor) for n, inputs in examples
    ]
    cases += [(None, s.reference_inputs, s.inputs, floor if s.same_for_both else None) for s in verification.samples]
    return tuple(
        judge_point(
            kind,
            part.signature,
            inputs,
            partial(reference, expected),
            partial(engine.run, inputs),
            gate,
            seed=seed,
            floor=noise,
        )
        for seed, expected, inputs, noise in cases
    )
