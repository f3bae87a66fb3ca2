"""A part's graph against its Reference, with the gate, grid and samples that the project states for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from vlm_export.checkpoint.known import KnownCheckpoint
from vlm_export.export.stages import StepProgress
from vlm_export.family import Model, Part, Reference
from vlm_export.verify.gates import GATES, PART_GATES, Gate
from vlm_export.verify.grid import grid_for
from vlm_export.verify.points import EngineRun
from vlm_export.verify.report import PartReport
from vlm_export.verify.samples import Sample
from vlm_export.verify.verifier import verify_part

PRECISION = "fp32"
# A part with more weights than this is verified on a grid that still has every axis' ends, but no large batch.
_LARGE_PART_BYTES = 1 << 30
_LARGE_PART_ROWS = 6
# Inputs and outputs of one point; more only repeats what shorter rows show.
_MAX_POINT_BYTES = 256 << 20


@dataclass(frozen=True)
class PartVerification:
    """What the verifications of a part's graphs have in common."""

    part: Part
    model: Model
    known: KnownCheckpoint | None
    samples: list[Sample]

    def run(self, engine: EngineRun, engine_name: str, reference: Reference, progress: StepProgress) -> PartReport:
        """The report over the grid and the samples."""
        size_bytes = sum(tensor.nbytes for tensor in self.part.module.state_dict().values())
        budget = _LARGE_PART_ROWS if size_bytes > _LARGE_PART_BYTES else None
        return verify_part(
            self.part,
            reference,
            engine,
            self._gate(),
            grid_for(self.part.signature, budget_rows=budget, budget_bytes=_MAX_POINT_BYTES),
            self.samples,
            variant=PRECISION,
            reference_name=self.model.reference_name,
            engine_name=engine_name,
            pad_token_id=None if self.model.text is None else self.model.text.pad_token_id,
            progress=progress,
        )

    def _gate(self) -> Gate:
        if self.part.name in PART_GATES:
            return GATES[PART_GATES[self.part.name]]
        stated = self.known.tolerances.get(PRECISION) if self.known else None
        if stated is None:
            return GATES[PRECISION]
        return replace(GATES[PRECISION], max_abs_relative=stated.max_abs, cosine=stated.cosine)


def engine_label(providers: Sequence[str]) -> str:
    """The engine's name, version and providers, for the report."""
    return f"onnxruntime {version('onnxruntime')} ({', '.join(providers)})"
