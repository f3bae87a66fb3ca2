"""Every pass on generated models: what is computed stays, a second run changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlm_export.graph.core.dead_code import remove_dead_code
from vlm_export.graph.passes.cancel_transposes import cancel_transposes
from vlm_export.graph.passes.constant_fold import fold_all_constants
from vlm_export.graph.passes.convert_opset import convert_opset
from vlm_export.graph.passes.infer_shapes import infer_shapes
from vlm_export.graph.passes.opset_imports import add_opset_imports
from vlm_export.graph.passes.remove_noops import remove_noops
from vlm_export.graph.passes.share_initializers import share_initializers, share_stored_weights
from vlm_export.graph.passes.static_arguments import make_arguments_static

PASSES = (
    remove_noops,
    cancel_transposes,
    make_arguments_static,
    fold_all_constants,
    remove_dead_code,
    share_initializers,
    infer_shapes,
    share_stored_weights,
    add_opset_imports,
)


@pytest.mark.parametrize("change", PASSES, ids=lambda change: str(change.__name__))
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_what_is_computed_stays(random_graphs: ModuleType, change: Callable[[ir.Model], object], first: int) -> None:
    for seed in range(first, first + 10):
        case = random_graphs.random_model(seed)
        expected = random_graphs.compute(case.model, case.feeds)
        interface = _interface(case.model)
        change(case.model)
        random_graphs.check(case.model)
        assert random_graphs.same(random_graphs.compute(case.model, case.feeds), expected), seed
        assert _interface(case.model) == interface, seed
        form = random_graphs.normal_form(case.model)
        assert not change(case.model), seed
        assert random_graphs.normal_form(case.model) == form, seed


@pytest.mark.parametrize("first", range(0, 40, 20))
def test_all_passes_in_a_row(random_graphs: ModuleType, first: int) -> None:
    removed = 0
    for seed in range(first, first + 20):
        case = random_graphs.random_model(seed, 25)
        expected = random_graphs.compute(case.model, case.feeds)
        before = sum(1 for _ in case.model.graph.all_nodes())
        for change in PASSES:
            change(case.model)
        random_graphs.check(case.model)
        assert random_graphs.same(random_graphs.compute(case.model, case.feeds), expected), seed
        removed += before - sum(1 for _ in case.model.graph.all_nodes())
    # The generator leaves dead nodes, Identities, casts to the same dtype, and shapes of fixed axes.
    assert removed > 20


@pytest.mark.parametrize("version", [19, 21, 23])
def test_another_opset_computes_the_same(random_graphs: ModuleType, version: int) -> None:
    for seed in range(20):
        case = random_graphs.random_model(seed)
        expected = random_graphs.compute(case.model, case.feeds)
        convert_opset(case.model, version)
        assert case.model.opset_imports[""] == version
        assert all(function.opset_imports[""] == version for function in case.model.functions.values())
        random_graphs.check(case.model)
        results = random_graphs.compute(case.model, case.feeds)
        for old, new in zip(expected, results, strict=True):
            # Kernels of other versions may round otherwise.
            assert all(np.allclose(old[name], new[name], rtol=1e-6, atol=1e-6, equal_nan=True) for name in old)


def _interface(model: ir.Model) -> Any:
    return [
        [(value.name, value.dtype, None if value.shape is None else value.shape.dims) for value in values]
        for values in (model.graph.inputs, model.graph.outputs)
    ]
