"""Plants faults in the graphs of a tiny CLIP before they become float16, and asks each half of the proof of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from faults.checkpoint import write_checkpoint
from faults.graph import GRAPH_FAULTS, GraphFault
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import VerificationError
from vlm_export.exporting.backends import export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.fp16_proof import rounded_points, unrounded_report
from vlm_export.exporting.ledger import account_for
from vlm_export.exporting.verification import PartVerification, part_samples
from vlm_export.family import DEFAULT_BUILD, Model, Reference
from vlm_export.models.registry import identify
from vlm_export.precision.fp16 import convert_to_fp16, rounded_from
from vlm_export.proof.cached_reference import CachedReference
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import OrtEngine

LAYERS = {"first": 0, "middle": 1, "last": 2}
_GRAPH = "graph.onnx"


@dataclass(frozen=True)
class PartGraph:
    """A part with its float32 graph, to be damaged and made float16 in `folder`."""

    verification: PartVerification
    reference: Reference
    graph: ir.Model
    folder: Path


@dataclass(frozen=True)
class Seen:
    """What a comparison measured of the output, as the relative error of a row; `share` is of the nearest gate."""

    floor: float
    gate: float
    seen: float
    share: float
    passed: bool


@dataclass(frozen=True)
class HalfVerdict:
    """What is seen of one fault; None: the fault is planted in no layer, and `of_weights` where the ledger is right.

    Attributes:
        rounded: the float16 graph, as hardware rounds it, by the noise of float16.
        unrounded: its nodes in float32 by the noise of float32.
        of_weights: what the ledger says.
    """

    fault: GraphFault | None
    part: str
    layer: str
    rounded: Seen
    unrounded: Seen
    of_weights: str | None

    @property
    def found_by(self) -> str:
        """Which half of the proof sees the fault whatever the model's noise is, "" for none."""
        if self.of_weights is not None:
            return "ledger"
        return "" if self.unrounded.passed else "float32"


@contextmanager
def part_graphs(folder: Path, seed: int = 0) -> Iterator[list[PartGraph]]:
    """The float32 graphs of a tiny CLIP of three layers with weights of that seed."""
    folder.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(str(write_checkpoint(folder / "checkpoint", seed, layers=len(LAYERS))))
    with ScratchStore(folder / "weights.bin") as store:
        family, checkpoint = identify(checkpoint)
        model = family.build(checkpoint, store, DEFAULT_BUILD)
        yield [_part_graph(model, i, folder) for i in range(len(model.parts))]


def _part_graph(model: Model, index: int, folder: Path) -> PartGraph:
    part = model.parts[index]
    verification = PartVerification(part, model, None, part_samples(part, model, None))
    graph = finish_graph(simplify_graph(export_part(part, 17, "torchscript")), part.signature)
    own = folder / part.name
    own.mkdir()
    return PartGraph(verification, CachedReference(verification.load_reference()), graph, own)


def verdicts(parts: list[PartGraph]) -> Iterator[HalfVerdict]:
    """The right graphs, then every fault in every part and layer."""
    for part in parts:
        yield judge(part, None, "-")
    for fault in GRAPH_FAULTS:
        for part in parts:
            for layer in LAYERS if fault.in_layers else ("-",):
                yield judge(part, fault, layer)


def judge(at: PartGraph, fault: GraphFault | None, layer: str) -> HalfVerdict:
    """Plants the fault, makes the graph float16 and proves it as an export does."""
    graph = at.graph.clone()
    if fault is not None:
        fault.plant(graph, LAYERS.get(layer, 0))
    half, path = convert_to_fp16(graph), at.folder / _GRAPH
    write_graph(half, path)
    constants = rounded_from(half)
    start: Callable[[Path], OrtEngine] = partial(OrtEngine, threads=1, exact=True)
    verification = at.verification
    floor = verification.floor(at.reference, "fp16")
    assert floor is not None
    points = rounded_points(path, start, verification, at.reference, floor)
    rounded = PartReport(verification.part.name, "fp16", verification.gate("fp16"), points, "", "", floor=floor.floor)
    unrounded = unrounded_report(
        path, start, verification, at.reference, lambda _: constants, engine_name="engine", scratch=at.folder
    )
    assert isinstance(unrounded, PartReport)
    return HalfVerdict(fault, rounded.part, layer, _seen(rounded), _seen(unrounded), _ledger_says(at, constants))


def _seen(report: PartReport) -> Seen:
    assert report.floor is not None
    (output,) = report.floor.outputs
    seen, gate = report.seen[output], report.floor.gate(output)
    assert gate is not None
    share = report.floor.share(output, seen)
    return Seen(report.floor.outputs[output].row_error, gate.row_error, seen.row_error, share, report.passed)


def _ledger_says(at: PartGraph, constants: dict[str, ir.TensorProtocol]) -> str | None:
    try:
        account_for(at.verification.part, at.folder, _GRAPH, {}, constants)
    except VerificationError as error:
        return str(error.got)
    return None
