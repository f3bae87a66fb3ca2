"""Surgery on models that no one here wrote: ONNX's backend tests keep their recorded outputs."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from vlm_export.errors import GraphError
from vlm_export.graph.core.dead_code import remove_dead_code
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.graph.core.names import defined_values
from vlm_export.graph.edits.compose import compose
from vlm_export.graph.edits.extract import extract, split
from vlm_export.graph.edits.io_edits import rename_tensors
from vlm_export.graph.passes.cancel_transposes import cancel_transposes
from vlm_export.graph.passes.constant_fold import fold_all_constants
from vlm_export.graph.passes.convert_opset import convert_opset
from vlm_export.graph.passes.infer_shapes import infer_shapes
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.graph.passes.static_arguments import make_arguments_static
from vlm_export.graph.prove.compare import equal_values

backend = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("backend_cases.py"))))


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    return list(backend.runnable_cases())


def _fault(model: onnx.ModelProto) -> str:
    """What ONNX's checker says, or nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    # Its two kinds of exceptions share no base.
    except Exception as error:
        return str(error)
    return ""


def _check(
    cases: list[Any], change: Callable[[Any], ir.Model | None], same: Callable[[Any, Any], bool] = equal_values
) -> int:
    """Changes each model, checks and runs it; returns how many there were, and fails with the names of the wrong."""
    wrong, count = [], 0
    for case in cases:
        model = change(case)
        if model is None:
            continue
        count += 1
        proto = ir.to_proto(model)
        outputs = backend.run(proto, case.inputs)
        # Some are invalid by the checker's lights: nothing can be asked of their changed forms.
        if not all(map(same, case.outputs, outputs)) or (_fault(proto) and not _fault(case.model)):
            wrong.append(case.name)
    assert not wrong
    return count


def test_most_models_run(cases: list[Any]) -> None:
    names = {case.name for case in cases}
    # Of onnx 1.23 with onnxruntime 1.31: 1441 of 2031. A newer pair may drop some; all the tests below stand on these.
    assert len(names) >= 1200
    assert sum(name.startswith("light_") for name in names) >= 5
    assert sum(name.startswith("test_operator_") for name in names) >= 20


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (remove_noops, 100),
        (cancel_transposes, 1),
        (make_arguments_static, 100),
        (fold_all_constants, 80),
        (remove_dead_code, 50),
        # A part of them, for nearly every model changes.
        (infer_shapes, 50),
    ],
)
def test_passes(cases: list[Any], change: Callable[[ir.Model], object], least: int) -> None:
    def changed(case: Any) -> ir.Model | None:
        model: ir.Model = case.fresh()
        if not change(model):
            return None
        text = str(ir.to_proto(model))
        assert not change(model), case.name
        assert str(ir.to_proto(model)) == text, case.name
        return model

    assert _check(cases[:: 4 if change is infer_shapes else 1], changed) >= least


@pytest.mark.parametrize("version", [18, 25])
def test_converted_opset(cases: list[Any], version: int) -> None:
    def converted(case: Any) -> ir.Model | None:
        model: ir.Model = case.fresh()
        if model.opset_imports.get("", version) == version:
            return None
        try:
            convert_opset(model, version)
        except GraphError:
            assert str(ir.to_proto(model)) == str(ir.to_proto(case.fresh()))
            return None
        return model

    # A part of them, for the converter is slow; and not test_swish, whose operator onnxruntime lacks at opset 25.
    known = [case for case in cases[::8] if case.name != "test_swish"]
    # Kernels of different versions round differently.
    assert _check(known, converted, backend.is_close) >= 80


def test_renamed(cases: list[Any]) -> None:
    def renamed(case: Any) -> ir.Model:
        model: ir.Model = case.fresh()
        # The interface, and some of what is between.
        values = dict.fromkeys((*model.graph.inputs, *model.graph.outputs, *list(defined_values(model.graph))[:6]))
        rename_tensors(model, {str(value.name): f"new/{value.name}" for value in values})
        assert all(str(value.name).startswith("new/") for value in (*model.graph.inputs, *model.graph.outputs))
        return model

    assert _check(cases[::3], renamed) == len(cases[::3])


def test_extracted_and_composed(cases: list[Any]) -> None:
    halves = 0

    def rebuilt(case: Any) -> ir.Model | None:
        nonlocal halves
        model = case.fresh()
        tensors = [str(value.name) for node in model.graph for value in node.outputs if value.name]
        for tensor in tensors[len(tensors) // 2 :][:3] if len(tensors) > 1 else []:
            try:
                parts = split(model, [tensor])
            except GraphError:
                continue
            halves += 1
            shared, inputs, outputs = parts.shared_inputs, parts.inputs, parts.outputs
            return compose(
                parts.first, parts.second, parts.connections, shared_inputs=shared, inputs=inputs, outputs=outputs
            )
        part = extract(model, None, [str(value.name) for value in dict.fromkeys(model.graph.outputs)])
        needed = [value for value in part.graph.inputs if not value.is_initializer()]
        # Inputs that no output depends on are not part of what is extracted.
        return part if len(needed) == len(case.inputs) else None

    assert _check(cases[::3], rebuilt) >= 350
    assert halves >= 45


def test_external_data_round_trip(cases: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external = 0
    # onnxruntime reads what decides shapes from the graph file only.
    storage = Storage(external=True, threshold_bytes=64)
    # What is asked here is not durability.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def reopened(case: Any) -> ir.Model:
        nonlocal external
        path = tmp_path / f"{case.name}.onnx"
        written = save_model(case.fresh(), path, storage=storage)
        model = open_model(path)
        assert all(map(equal_values, case.outputs, backend.run(str(path), case.inputs)))
        external += len(written) > 1
        save_model(model, path, storage=Storage(external=False), overwrite=True)
        return open_model(path)

    # What is written with its weights outside is all of these; of the others a part will do.
    chosen = [case for number, case in enumerate(cases) if number % 6 == 0 or _has_large_weights(case)]
    assert _check(chosen, reopened) == len(chosen)
    assert external >= 35


def _has_large_weights(case: Any) -> bool:
    return any(tensor.ByteSize() > 64 for tensor in case.model.graph.initializer)


@pytest.mark.slow
def test_large_networks() -> None:
    large = [case for case in backend.runnable_cases(large=True) if case.name in backend.LARGE]
    assert len(large) == 2
    for case in large:
        model = case.fresh()
        remove_noops(model)
        cancel_transposes(model)
        assert all(map(equal_values, case.outputs, backend.run(ir.to_proto(model), case.inputs)))
