"""A part's graph against its Reference, with the gate, grid and samples that the project states for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from vlm_export.checkpoint.sources.known import KnownCheckpoint
from vlm_export.errors import InputError
from vlm_export.exporting.floor import floor_points, measure_floor
from vlm_export.exporting.fp16_proof import NOT_UNROUNDED, rounded_points, unrounded_report
from vlm_export.exporting.options import FP32
from vlm_export.exporting.originals import quiet_transformers
from vlm_export.exporting.stages import StepProgress
from vlm_export.family import Model, Part, Reference
from vlm_export.proof.cached_reference import CachedReference
from vlm_export.proof.engine import MAPPED_NOTE, engine_label, verifying_engine
from vlm_export.proof.floor import ELSEWHERE, RULES, FloorJudge
from vlm_export.proof.gates import GATES, PART_GATES, Gate, gate_name
from vlm_export.proof.golden import golden_points
from vlm_export.proof.grid import (
    LONGEST_DRAWN,
    RUNTIME_BATCHES,
    Attention,
    GridPoint,
    batches_left_out,
    grid_for,
    least_grid,
    left_out,
    runtime_points,
)
from vlm_export.proof.image_samples import takes_images
from vlm_export.proof.points import Arrays, EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.proof.samples import Sample, sample_inputs, synthetic_photographs
from vlm_export.proof.verifier import verify_part
from vlm_export.runtime.engines.onnxruntime import CPU
from vlm_export.runtime.inputs.images import open_image

# A part with more weights than this is verified on a grid that still has every axis' ends, but no large batch.
_LARGE_PART_BYTES = 1 << 30
_LARGE_PART_ROWS = 6
# Inputs and outputs of one point; more only repeats what shorter rows show.
_MAX_POINT_BYTES = 256 << 20
# Scores of one layer's attention, which engines hold several times: verifying a tiny model takes little memory, too.
_MAX_SCORES_BYTES = 64 << 20
# Above this, each run takes minutes, and graph and Reference do not fit in a usual machine's memory side by side.
HUGE_PART_BYTES = 8 << 30
# Below this, a point takes milliseconds, so that every length of a text and every batch can be tried.
_SMALL_PART_BYTES = 64 << 20
# Of larger parts those batches that load() and `embed` feed; images take hundreds of times what short texts do.
_IMAGE_BATCHES, _TEXT_BATCHES = (16, 32), (32, 64)
_LARGE_IMAGE_BATCHES, _LARGE_TEXT_BATCHES = (8,), (64,)
_LARGE_PART_LENGTH = 64
_GIB = 1 << 30


@dataclass(frozen=True)
class PartVerification:
    """What the verifications of a part's graphs have in common."""

    part: Part
    model: Model
    known: KnownCheckpoint | None
    samples: list[Sample]

    @property
    def weights_bytes(self) -> int:
        """Of the Reference, in float32."""
        return weights_bytes(self.part)

    @property
    def is_huge(self) -> bool:
        return _is_huge(self.part)

    def load_reference(self) -> Reference:
        """The part's Reference; a huge one remembers its outputs, since every run of it takes minutes."""
        with quiet_transformers():
            reference = self.model.references[self.part.name]()
        return CachedReference(reference) if self.is_huge else reference

    def run(
        self,
        engine: EngineRun,
        engine_name: str,
        reference: Reference,
        progress: StepProgress,
        precision: str = FP32,
        *,
        mapped: bool = False,
        floor: FloorJudge | None = None,
    ) -> PartReport:
        """The report over the grid and the samples, by the gate of that precision.

        Args:
            floor: from `floor`.
            mapped: the engine runs with its weights mapped, which the report then says.
        """
        grid, more = self._grid(), self._runtime_points()
        if self.is_huge:
            reference = self._prepared(reference, grid)
        return verify_part(
            self.part,
            reference,
            engine,
            self.gate(precision),
            grid,
            self.samples,
            more=more,
            variant=precision,
            reference_name=self.model.reference_name,
            engine_name=engine_name,
            pad_token_id=None if self.model.text is None else self.model.text.pad_token_id,
            progress=progress,
            with_self_checks=not self.is_huge,
            not_run=(*self._left_out(grid, more), *((MAPPED_NOTE,) if mapped else ())),
            floor=floor,
        )

    def floor(self, reference: Reference, precision: str) -> FloorJudge | None:
        """The measured floor of that precision; None for a part whose outputs other things than rounding move."""
        return measure_floor(reference, precision, self.floor_inputs()) if self.has_floor(precision) else None

    def has_floor(self, precision: str) -> bool:
        """Whether outputs of that precision are judged by a measured floor."""
        return gate_name(self.part.name, precision) in RULES and self.part.name not in PART_GATES

    def floor_inputs(self) -> list[Arrays]:
        """Where the floor is measured."""
        signature = self.part.signature
        # The first is the smallest.
        points = (
            least_grid(signature)[:1] if self.is_huge else floor_points(signature, self.weights_bytes, self._attention)
        )
        inputs = list(map(self._examples, points))
        # A trained model's noise on images and sentences is not that on random numbers.
        samples = [sample.inputs for sample in self.samples if sample.same_for_both]
        return [*inputs, *samples[: len(inputs)]]

    def expected_inputs(self) -> Iterator[Arrays]:
        """What the Reference is asked to compute for a proof of the part and its golden records, in that order."""
        yield from map(self._examples, (*self._grid(), *self._runtime_points()))
        yield from (sample.reference_inputs for sample in self.samples)
        yield from map(self._examples, self.golden_points())
        yield from (sample.inputs for sample in self.samples[:1])

    def _examples(self, point: GridPoint) -> Arrays:
        return self.part.examples(point.sizes, point.seed)

    def _grid(self) -> tuple[GridPoint, ...]:
        if self.is_huge:
            return least_grid(self.part.signature)
        rows = _LARGE_PART_ROWS if self.weights_bytes > _LARGE_PART_BYTES else None
        return grid_for(self.part.signature, budget_rows=rows, budget_bytes=_MAX_POINT_BYTES, attention=self._attention)

    @property
    def _attention(self) -> Attention:
        """The part's, whose scores may take twice what its weights do, which both engines hold beside them."""
        heads = (getattr(module, "heads", 1) for module in self.part.module.modules())
        return Attention(max(heads), max(_MAX_SCORES_BYTES, 2 * self.weights_bytes))

    def golden_points(self) -> tuple[GridPoint, ...]:
        """The points of the records."""
        return golden_points(self.part.signature, self._attention)

    def _runtime_points(self) -> tuple[GridPoint, ...]:
        """What deployments run beside the grid; of a huge part nothing, since every run takes minutes."""
        if self.is_huge:
            return ()
        batches, longest = self._runtime_sizes()
        return runtime_points(
            self.part.signature,
            batches,
            every_length=self._is_small,
            longest=longest,
            budget_bytes=_MAX_POINT_BYTES,
            attention=self._attention,
        )

    def _runtime_sizes(self) -> tuple[Sequence[int], int]:
        """The batches, and the longest text that is drawn."""
        if self._is_small:
            return RUNTIME_BATCHES, LONGEST_DRAWN
        images = takes_images(self.part.signature)
        if self.weights_bytes <= _LARGE_PART_BYTES:
            return (_IMAGE_BATCHES if images else _TEXT_BATCHES), LONGEST_DRAWN
        return (_LARGE_IMAGE_BATCHES if images else _LARGE_TEXT_BATCHES), _LARGE_PART_LENGTH

    @property
    def _is_small(self) -> bool:
        return self.weights_bytes <= _SMALL_PART_BYTES

    def _left_out(self, grid: Sequence[GridPoint], more: Sequence[GridPoint]) -> Iterator[str]:
        if self.is_huge and takes_images(self.part.signature):
            yield "synthetic photographs but for the first: every run takes minutes"
        room = f"a point's inputs and outputs at most {_MAX_POINT_BYTES >> 20} MiB"
        scores = f"the scores of its attention at most {self._attention.budget_bytes >> 20} MiB"
        reason = f"the weights take {self.weights_bytes / _GIB:.1f} GiB, {room}, {scores}"
        points = left_out(self.part.signature, grid)
        sizes = ", ".join(map(str, batches_left_out(self.part.signature, (*grid, *more))))
        missing = [*([points] if points else []), *([f"the runtime's batches of {sizes}"] if sizes else [])]
        if missing:
            yield f"{' and '.join(missing)}: {reason}"

    def _prepared(self, reference: Reference, grid: Sequence[GridPoint]) -> CachedReference:
        """Knows the outputs of all points: then the engine's weights need not share the memory with the Reference's,
        which would be read from disk again at every point."""
        remembered = reference if isinstance(reference, CachedReference) else CachedReference(reference)
        for point in grid:
            remembered.prepare(self._examples(point))
        for sample in self.samples:
            remembered.prepare(sample.reference_inputs)
        return remembered

    def gate(self, precision: str) -> Gate:
        """The project's, or that precision's of a known checkpoint."""
        name = gate_name(self.part.name, precision)
        stated = self.known.tolerances.get(name) if self.known else None
        if stated is None:
            return GATES[name]
        return replace(GATES[name], max_abs_relative=stated.max_abs, cosine=stated.cosine)


def prove_variant(
    verification: PartVerification,
    reference: Reference,
    precision: str,
    path: Path,
    progress: StepProgress,
    *,
    constants: Callable[[ir.Model], Mapping[str, ir.TensorProtocol]] | str,
    scratch: Path,
    providers: Sequence[str] = (CPU,),
    threads: int | None = None,
    for_export: bool = False,
) -> PartReport:
    """A variant's graph against the Reference; of a float16 one, what its engine hides as well.

    Args:
        constants: for `unrounded_report`, or why they are not known.
        scratch: a directory with room for the weights in float32.
        for_export: also runs a copy that rounds every value, which is written beside the graph; and computes no more
            of a graph that differs, since it is not published.
    """
    start = partial(verifying_engine, weights_bytes=verification.weights_bytes, threads=threads)
    floor = verification.floor(reference, precision)
    if floor is not None and list(providers) != [CPU]:
        floor.floor = replace(floor.floor, allowance=ELSEWHERE)
    engine = start(path, providers=providers)
    label = engine_label(providers, mapped=engine.mapped)
    report = verification.run(engine.run, label, reference, progress, precision, mapped=engine.mapped, floor=floor)
    del engine  # One holds weights at a time.
    if precision == FP32 or (for_export and not report.passed):
        return report
    if for_export:
        rounded = rounded_points(path, start, verification, reference, floor)
        noise = report.floor if floor is None else floor.floor
        report = replace(report, points=(*report.points, *rounded), floor=noise)
    if isinstance(constants, str):
        return report.with_unrounded(f"{NOT_UNROUNDED}{constants}")
    # On the CPU, whatever runs the variant itself: what it shows does not depend on the engine.
    found = unrounded_report(
        path, start, verification, reference, constants, engine_name=engine_label((CPU,)), scratch=scratch
    )
    return report.with_unrounded(found)


def part_samples(part: Part, model: Model, tokenizer: Path | None, images: Sequence[Path] = ()) -> list[Sample]:
    """Images or sentences for a part: the project's own, of a huge part one image, and those that the user names.

    Args:
        tokenizer: the bundle's `tokenizer.json`, None for no sentences.

    Raises:
        InputError: an image cannot be read, or the model's preparation refuses it; the message names it.
    """
    spec, starts_with_pixels = model.image, takes_images(part.signature)
    own = synthetic_photographs()[:1] if starts_with_pixels and _is_huge(part) else None
    samples = sample_inputs(part.signature, spec, model.text, tokenizer, images=own)
    for path in images if starts_with_pixels else ():
        try:
            samples += sample_inputs(part.signature, spec, None, None, images=[open_image(path)])
        except InputError as error:
            error.where = str(path)
            raise
    return samples


def variant_label(part: Part, precision: str) -> str:
    """What stages call a variant: the part's name, and the precision if it is not the default."""
    return part.name if precision == FP32 else f"{part.name} {precision}"


def weights_bytes(part: Part) -> int:
    """What the weights of a part take, in float32."""
    return sum(tensor.nbytes for tensor in part.module.state_dict().values())


def _is_huge(part: Part) -> bool:
    return weights_bytes(part) > HUGE_PART_BYTES
