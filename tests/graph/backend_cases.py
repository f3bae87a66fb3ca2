"""The ONNX backend test models inside the `onnx` package, with recorded inputs and outputs, as far as they run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.backend.test import runner
from onnx.backend.test.case import node as node_cases

from vlm_export.graph.core.onnxruntime_session import start_session

DATA = Path(runner.__file__).parents[1] / "data"
# The two that take several seconds and half a gigabyte each.
LARGE = ("light_vgg19", "light_bvlc_alexnet")


@dataclass(frozen=True)
class Case:
    """A model that onnxruntime runs.

    Attributes:
        outputs: what onnxruntime gives for it; the recorded outputs, within the tolerance of ONNX's own test runner.
    """

    name: str
    model: onnx.ModelProto
    inputs: Sequence[Any]
    outputs: Sequence[Any]

    def fresh(self) -> ir.Model:
        # The library renames tensors inside the message that it was read from.
        model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(self.model.SerializeToString()))
        return model


def run(model: onnx.ModelProto | str, inputs: Sequence[Any]) -> list[Any]:
    """The outputs for inputs in the order of the graph's."""
    session = start_session(model if isinstance(model, str) else model.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    outputs: list[Any] = session.run(None, dict(zip(names, inputs, strict=False)))
    return outputs


def runnable_cases(large: bool = False) -> Iterator[Case]:
    """Generated models of single operators, converted and hand-made ones with recorded files, and small networks."""
    for name, model, inputs, recorded in (*_node_cases(), *_recorded_cases(), *_light_cases(large)):
        try:
            outputs = run(model, inputs)
        # What onnxruntime cannot run; its exceptions share no base but Exception.
        except Exception:
            continue
        if len(outputs) == len(recorded) and all(map(is_close, recorded, outputs)):
            yield Case(name, model, inputs, outputs)


def _node_cases() -> Iterator[tuple[str, onnx.ModelProto, Sequence[Any], Sequence[Any]]]:
    with warnings.catch_warnings():
        # They compute logarithms of zero and the like on purpose.
        warnings.simplefilter("ignore")
        cases = node_cases.collect_testcases(None)
    for case in cases:
        if case.model is not None and case.data_sets:
            yield case.name, case.model, *case.data_sets[0]


def _recorded_cases() -> Iterator[tuple[str, onnx.ModelProto, Sequence[Any], Sequence[Any]]]:
    for path in sorted(DATA.glob("*/*/model.onnx")):
        model = onnx.load(path)
        folder = path.parent / "test_data_set_0"
        inputs = [_load(folder / f"input_{i}.pb", entry.type) for i, entry in enumerate(model.graph.input)]
        outputs = [_load(folder / f"output_{i}.pb", entry.type) for i, entry in enumerate(model.graph.output)]
        yield path.parent.name, model, [value for value in inputs if value is not None], outputs


def _light_cases(large: bool) -> Iterator[tuple[str, onnx.ModelProto, Sequence[Any], Sequence[Any]]]:
    for path in sorted((DATA / "light").glob("*.onnx")):
        if (path.stem in LARGE) != large:
            continue
        model = onnx.load(path)
        weights = {entry.name for entry in model.graph.initializer}
        entries = [entry for entry in model.graph.input if entry.name not in weights]
        inputs = [runner.Runner.generate_dummy_data(entry) for entry in entries]
        yield path.stem, model, inputs, [numpy_helper.to_array(onnx.load_tensor(f"{path.with_suffix('')}_output_0.pb"))]


def _load(path: Path, kind: onnx.TypeProto) -> Any:
    if not path.exists():
        return None
    content = path.read_bytes()
    if kind.HasField("sequence_type"):
        sequence = onnx.SequenceProto.FromString(content)
        return numpy_helper.to_list(sequence)
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def is_close(expected: Any, got: Any) -> bool:
    """ONNX's own tolerances."""
    if isinstance(expected, list | tuple):
        return isinstance(got, list) and len(expected) == len(got) and all(map(is_close, expected, got))
    expected, got = np.asarray(expected), np.asarray(got)
    if expected.shape != got.shape:
        return False
    if expected.dtype.kind not in "fc":
        return bool(np.array_equal(expected, got))
    return bool(np.allclose(expected, got, rtol=1e-3, atol=1e-7, equal_nan=True))
