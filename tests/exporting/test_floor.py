"""Faults planted in written graphs, which fail by the measured floor, and right graphs, which leave room below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from faults.graph import GRAPH_FAULTS, GraphFault
from onnx import numpy_helper

from vlm_export.exporting.backends import export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.floor import float16_outputs, float64_outputs, measure_noise, measure_noise_around
from vlm_export.exporting.fp16_proof import rounded_points
from vlm_export.exporting.options import Precision
from vlm_export.exporting.verification import PartVerification, part_samples
from vlm_export.family import Model, Part, Reference, reference_from_module
from vlm_export.precision.fp16 import convert_to_fp16
from vlm_export.proof.floor import FloorJudge
from vlm_export.proof.metrics import Deviation
from vlm_export.proof.points import Arrays, EngineRun, PointResult
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.specs.signature import Axis, Signature, TensorSpec

Array = npt.NDArray[Any]
Graph = onnx.ModelProto
CLIP = "vit_p14/state_dict_fp32.pt"
# What of its gate a right graph may use: the rest is room.
ROOM = 0.6


@dataclass(frozen=True)
class Case:
    """A part with its graph at a precision, as written, and the floor."""

    verification: PartVerification
    reference: Reference
    precision: Precision
    path: Path
    floor: FloorJudge

    def report(self, engine: EngineRun) -> PartReport:
        progress = lambda done, total: None  # noqa: E731
        return self.verification.run(engine, "engine", self.reference, progress, self.precision, floor=self.floor)

    def damaged(self, plant: Callable[[Graph], None]) -> PartReport:
        graph = onnx.load(self.path)
        plant(graph)
        damaged = self.path.with_suffix(".damaged.onnx")
        onnx.save(graph, damaged)
        return self.report(_engine(damaged).run)

    def faulty(self, fault: GraphFault) -> PartReport:
        graph, damaged = ir.load(self.path), self.path.with_suffix(".faulty.onnx")
        fault.plant(graph, 0)
        write_graph(graph, damaged)
        return self.report(_engine(damaged).run)


def _engine(path: Path) -> OrtEngine:
    return OrtEngine(path, threads=1, exact=True)


@pytest.fixture(scope="module")
def case_of(
    oracle_model: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Precision], Case]:
    model, folder = oracle_model(CLIP), tmp_path_factory.mktemp("floor")

    @cache
    def make(name: str, precision: Precision) -> Case:
        part = next(part for part in model.parts if part.name == name)
        graph = finish_graph(simplify_graph(export_part(part, 17, "torchscript")), part.signature)
        path = folder / f"{name}_{precision}.onnx"
        write_graph(convert_to_fp16(graph) if precision == "fp16" else graph, path)
        verification = PartVerification(part, model, None, part_samples(part, model, None))
        reference = verification.load_reference()
        floor = verification.floor(reference, precision)
        assert floor is not None
        return Case(verification, reference, precision, path, floor)

    return make


# Faults.


def _at_a_size(operator: str, axis: int, size: int, factor: float) -> Callable[[Graph], None]:
    """The output times a factor where that axis of the input compares so with the size."""

    def plant(graph: Graph) -> None:
        given, output = graph.graph.input[0].name, graph.graph.output[0].name
        for node in graph.graph.node:
            for i, name in enumerate(node.output):
                if name == output:
                    node.output[i] = "unscaled"
        numbers = {"axis_index": np.int64(axis), "size": np.int64(size), "off": np.float32(factor)}
        numbers["right"] = np.float32(1)
        graph.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in numbers.items())
        graph.graph.node.extend(
            [
                onnx.helper.make_node("Shape", [given], ["given_shape"]),
                onnx.helper.make_node("Gather", ["given_shape", "axis_index"], ["given_size"]),
                onnx.helper.make_node(operator, ["given_size", "size"], ["wrong"]),
                onnx.helper.make_node("Where", ["wrong", "off", "right"], ["factor"]),
                onnx.helper.make_node("Mul", ["unscaled", "factor"], [output]),
            ]
        )

    return plant


MATRIX = next(fault for fault in GRAPH_FAULTS if fault.name == "fc1 times 1.0005")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_right_graph_leaves_room(case_of: Callable[..., Case], name: str, precision: Precision) -> None:
    case = case_of(name, precision)
    report = case.report(_engine(case.path).run)
    assert report.passed, report.failures
    assert _used(report.seen, case.floor) < ROOM
    if precision == "fp16":
        points = rounded_points(case.path, _engine, case.verification, case.reference, case.floor)
        assert not [point.failures for point in points if point.failures]
        assert max(_used(point.deviations, case.floor) for point in points if point.deviations) < ROOM


def _used(seen: Mapping[str, Deviation], judge: FloorJudge) -> float:
    """The largest share of a gate that was seen."""
    return max(judge.floor.share(output, deviation) for output, deviation in seen.items())


@pytest.mark.parametrize("fault", GRAPH_FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails(case_of: Callable[..., Case], fault: GraphFault) -> None:
    report = case_of("text", "fp32").faulty(fault)
    assert not report.passed
    assert any("measured noise" in str(failure) for _, failure in report.failures)


def test_a_matrix_that_is_a_twentieth_of_a_percent_off_fails(case_of: Callable[..., Case]) -> None:
    assert not case_of("vision", "fp32").faulty(MATRIX).passed


@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_graph_that_is_wrong_from_a_batch_of_6_on_fails(case_of: Callable[..., Case], name: str) -> None:
    report = case_of(name, "fp32").damaged(_at_a_size("GreaterOrEqual", 0, 6, 1.02))
    assert {point.sizes["batch"] for point in _failed(report)} == {8, 16, 32, 64}


@pytest.mark.parametrize("length", [6, 18])
def test_a_graph_that_is_wrong_at_one_length_alone_fails(case_of: Callable[..., Case], length: int) -> None:
    report = case_of("text", "fp32").damaged(_at_a_size("Equal", 1, length, 1.1))
    assert {point.sizes["sequence"] for point in _failed(report)} == {length}


def _failed(report: PartReport) -> list[PointResult]:
    return [point for point in report.points if point.failures]


# The Reference in other precisions.


def test_the_reference_in_float64_is_what_torch_gives_for_doubles(oracle_model: Callable[[str], Model]) -> None:
    import copy

    for part in oracle_model(CLIP).parts:
        sizes = {axis.name: 3 for axis in part.signature.axes}
        inputs = part.examples(sizes, 0)
        found = float64_outputs(reference_from_module(part), inputs)
        module = copy.deepcopy(part.module).double()
        tensors = [torch.from_numpy(array) for array in inputs.values()]
        with torch.no_grad():
            expected = module(*(t.double() if t.is_floating_point() else t for t in tensors)).numpy()
        (output,) = found.values()
        assert output.dtype == np.float64
        np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)


class Coordinates(torch.nn.Module):
    """Looks up a table at places that are computed from a size: 3000.5 is another place where float16 rounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.arange(4000.0) / 4000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1]).to(torch.float32) + 0.5
        return x * self.table[places.long()]


def test_coordinates_are_not_rounded_and_activations_are() -> None:
    def examples(sizes: Any, seed: int) -> dict[str, Array]:
        return {"x": np.full((1, 3001), 1 + 2**-12, np.float32)}

    signature = Signature(
        (TensorSpec("x", "float32", (1, "n")),), (TensorSpec("y", "float32", (1, "n")),), (Axis("n"),)
    )
    part = Part("p", Coordinates().eval(), signature, examples)
    reference, inputs = reference_from_module(part), examples({}, 0)
    exact, rounded = reference(inputs)["y"], float16_outputs(reference, inputs)["y"]
    assert np.array_equal(rounded, rounded.astype(np.float16))
    ratio: Arrays = {"y": rounded[0, 1:] / exact[0, 1:]}
    assert np.abs(ratio["y"] - 1).max() < 2**-9
    assert not np.array_equal(rounded, exact)


class Cancelling(torch.nn.Module):
    """Rounds to multiples of 2**-7 in float32, and leaves such multiples as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 2.0**16) - 2.0**16


@pytest.mark.parametrize(("values", "noise"), [(2, (5e-4, 1e-2)), (32, (0, 0))])
def test_few_values_have_the_noise_of_their_neighbours(values: int, noise: tuple[float, float]) -> None:
    inputs = {"x": np.full((1, values), 0.5, np.float32)}
    row = TensorSpec("x", "float32", (1, values))
    signature = Signature((row,), (TensorSpec("y", "float32", (1, values)),), ())
    reference = reference_from_module(Part("p", Cancelling(), signature, lambda sizes, seed: inputs))
    assert measure_noise(reference, "fp32", inputs)["y"].max_abs == 0
    assert noise[0] <= measure_noise_around(reference, "fp32", inputs)["y"].max_abs <= noise[1]
