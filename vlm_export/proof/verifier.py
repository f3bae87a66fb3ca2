"""Runs a part's Reference and an engine on the same inputs, over the grid and the samples, and judges every output.

The Reference is the only place where torch runs, and it is the caller's: it must be called outside every Lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlm_export.proof.floor import FloorJudge
from vlm_export.proof.gates import Gate
from vlm_export.proof.grid import BATCH_AXIS, SEQUENCE_AXIS, GridPoint
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays, EngineRun, PointKind, PointResult, judge_point
from vlm_export.proof.report import PartReport
from vlm_export.specs.signature import Signature

if TYPE_CHECKING:
    from vlm_export.family import Part, Reference
    from vlm_export.proof.samples import Sample

IDS_NAME = "input_ids"
MASK_NAME = "attention_mask"
_UNBOUNDED_PADDING = 9

Progress = Callable[[int, int], None]
"""Called after each point with the number of points done and of all points."""


def verify_part(
    part: Part,
    reference: Reference,
    engine: EngineRun,
    gate: Gate,
    grid: Sequence[GridPoint],
    samples: Sequence[Sample] = (),
    *,
    more: Sequence[GridPoint] = (),
    variant: str = "",
    reference_name: str = "reference",
    engine_name: str = "engine",
    pad_token_id: int | None = None,
    progress: Progress | None = None,
    with_self_checks: bool = True,
    not_run: Sequence[str] = (),
    floor: FloorJudge | None = None,
) -> PartReport:
    """Compares the engine with the Reference at every grid point and sample, and the engine with itself.

    Args:
        samples: images or sentences, from `sample_inputs`.
        more: further grid points, which play no part where the engine is compared with itself.
        variant: name in the report; the gate's by default.
        pad_token_id: states that tokens after end-of-text, masked where the part takes a mask, cannot change the
            outputs, and which token fills; then padded token ids must give what unpadded ones give.
        with_self_checks: False leaves the comparisons of the engine with itself out, and the report says so.
        not_run: what the caller has left out, for the report.
        floor: the measured noise, whose gates apply beside `gate`.
    """
    candidate = _Candidate(part, reference, engine, gate, floor)
    checks = list(_against_reference(candidate, (*grid, *more), samples))
    own = list(_against_itself(candidate, grid, pad_token_id))
    if with_self_checks:
        checks += own
    elif own:
        not_run = (*not_run, "the engine against itself: rows of a batch alone, padded tokens")
    points: list[PointResult] = []
    for check in checks:
        points.append(check())
        if progress is not None:
            progress(len(points), len(checks))
    name = variant or gate.name
    noise = None if floor is None else floor.floor
    return PartReport(part.name, name, gate, tuple(points), reference_name, engine_name, tuple(not_run), noise)


@dataclass(frozen=True)
class _Candidate:
    part: Part
    reference: Reference
    engine: EngineRun
    gate: Gate
    floor: FloorJudge | None

    @property
    def signature(self) -> Signature:
        return self.part.signature

    def at_grid_point(self, point: GridPoint) -> PointResult:
        inputs = self.part.examples(point.sizes, point.seed)
        expected, got = (lambda: self.reference(inputs)), (lambda: self.engine(inputs))
        return self._judge("grid", inputs, expected, got, point.seed)

    def at_sample(self, sample: Sample) -> PointResult:
        expected, got = (lambda: self.reference(sample.reference_inputs)), (lambda: self.engine(sample.inputs))
        floor = self.floor if sample.same_for_both else None
        return judge_point("sample", self.signature, sample.inputs, expected, got, self.gate, floor=floor)

    def rows_alone(self, point: GridPoint) -> PointResult:
        """Each row of a batch run alone against the batch."""
        inputs = self.part.examples(point.sizes, point.seed)
        got, expected = (lambda: self.engine(inputs)), (lambda: _joined_rows(self.engine, self.signature, inputs))
        return self._judge("rows_alone", inputs, expected, got, point.seed)

    def padding(self, point: GridPoint, pad_token_id: int) -> PointResult:
        """Token ids padded to the longest sequence against the same ids unpadded, at the positions of both."""
        inputs = self.part.examples(point.sizes, point.seed)
        padded = _padded(self.signature, inputs, pad_token_id)
        length = point.sizes[SEQUENCE_AXIS]
        expected, got = (lambda: self.engine(inputs)), (lambda: _cut(self.signature, self.engine(padded), length))
        return self._judge("padding", inputs, expected, got, point.seed)

    def _judge(
        self, kind: PointKind, inputs: Arrays, expected: Callable[[], Arrays], got: Callable[[], Arrays], seed: int
    ) -> PointResult:
        return judge_point(kind, self.signature, inputs, expected, got, self.gate, seed=seed, floor=self.floor)


def _against_reference(
    candidate: _Candidate, grid: Sequence[GridPoint], samples: Sequence[Sample]
) -> Iterator[Callable[[], PointResult]]:
    for point in grid:
        yield partial(candidate.at_grid_point, point)
    for sample in samples:
        yield partial(candidate.at_sample, sample)


def _against_itself(
    candidate: _Candidate, grid: Sequence[GridPoint], pad_token_id: int | None
) -> Iterator[Callable[[], PointResult]]:
    batched = [point for point in grid if point.rows > 1]
    if batched and _has_rows(candidate.signature):
        smallest = min(batched, key=lambda point: point.rows)
        yield partial(candidate.rows_alone, smallest)
    if pad_token_id is not None and _paddable(candidate.signature):
        limit = candidate.signature.axis(SEQUENCE_AXIS).maximum
        below = [point for point in grid if limit is None or point.sizes[SEQUENCE_AXIS] < limit]
        if below:
            longest = max(below, key=lambda point: point.sizes[SEQUENCE_AXIS])
            yield partial(candidate.padding, longest, pad_token_id)


def _has_rows(signature: Signature) -> bool:
    """Whether all tensors have a batch; single numbers, which all rows share, may stand beside them."""
    inputs = [tensor for tensor in signature.inputs if tensor.shape]
    return bool(inputs) and all(BATCH_AXIS in tensor.shape for tensor in (*inputs, *signature.outputs))


def _paddable(signature: Signature) -> bool:
    """Token ids in, with a mask or with one row of numbers per text out, and no other input as long as the ids."""
    lengthened = {tensor.name for tensor in signature.inputs if SEQUENCE_AXIS in tensor.shape}
    if lengthened == {IDS_NAME}:
        return len(signature.inputs) == 1 and not any(SEQUENCE_AXIS in tensor.shape for tensor in signature.outputs)
    return lengthened == {IDS_NAME, MASK_NAME}


def _padded(signature: Signature, inputs: Arrays, pad_token_id: int) -> dict[str, Array]:
    limit = signature.axis(SEQUENCE_AXIS).maximum
    padded = dict(inputs)
    for spec in signature.inputs:
        if SEQUENCE_AXIS not in spec.shape:
            continue
        array, position = inputs[spec.name], spec.shape.index(SEQUENCE_AXIS)
        missing = _UNBOUNDED_PADDING if limit is None else limit - array.shape[position]
        widths = [(0, missing if axis == position else 0) for axis in range(array.ndim)]
        padded[spec.name] = np.pad(array, widths, constant_values=pad_token_id if spec.name == IDS_NAME else 0)
    return padded


def _cut(signature: Signature, outputs: Arrays, length: int) -> dict[str, Array]:
    """The outputs without what stands past `length` tokens."""
    cut = dict(outputs)
    for tensor in signature.outputs:
        if SEQUENCE_AXIS in tensor.shape:
            position = tensor.shape.index(SEQUENCE_AXIS)
            cut[tensor.name] = np.take(outputs[tensor.name], range(length), axis=position)
    return cut


def _joined_rows(engine: EngineRun, signature: Signature, inputs: Arrays) -> dict[str, Array]:
    """Outputs of every row run alone, joined to a batch."""
    tensors = (*signature.inputs, *signature.outputs)
    positions = {tensor.name: tensor.shape.index(BATCH_AXIS) for tensor in tensors if tensor.shape}
    first = next(name for name in inputs if name in positions)
    alone: list[Mapping[str, Array]] = []
    for row in range(inputs[first].shape[positions[first]]):
        one = {
            name: np.take(array, [row], axis=positions[name]) if name in positions else array
            for name, array in inputs.items()
        }
        alone.append(engine(one))
    return {name: np.concatenate([row[name] for row in alone], axis=positions[name]) for name in signature.output_names}
