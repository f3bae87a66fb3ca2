"""Graphs of MiniCPM-V's and OmniLMM's Parts against what the originals computed, at sizes other than the traced ones.

Each known way to get such a graph wrong stands here too, and must be noticed.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from vlm_export.exporting.backends import DEFAULT_LOWERINGS, Exporter, Lowerings, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.lowerings import resample_graph_weights
from vlm_export.family import Model, Part, reference_from_module
from vlm_export.models.layers import navit, resampler, vit
from vlm_export.models.layers.positions import resample_position_embedding
from vlm_export.models.minicpmv import modules as minicpmv_modules
from vlm_export.proof.gates import GATES, judge
from vlm_export.proof.grid import grid_for
from vlm_export.proof.metrics import compare
from vlm_export.proof.points import Arrays, EngineRun
from vlm_export.proof.report import PartReport
from vlm_export.proof.verifier import verify_part
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.specs.signature import Axis

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "models" / "minicpmv_oracle.py")))
Array = npt.NDArray[Any]
Build = Callable[[str], Model]
Export = Callable[..., OrtEngine]
VARIANTS = (*oracle.GRID, *oracle.PACKED)
FORMS: list[tuple[Exporter, int]] = [("torchscript", 11), ("torchscript", 17)]
# Largest sizes in patches, of axes that count all of an image.
_PATCHES = {"packed_width": 40, "patches": 40}
RESIZE = Lowerings(interpolation="resize-op")


@pytest.fixture(scope="module")
def build(models_under: Callable[[Path], Build]) -> Build:
    return models_under(oracle.DATA)


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def write(part: Part, exporter: Exporter, opset: int, lowerings: Lowerings = DEFAULT_LOWERINGS) -> OrtEngine:
        path = tmp_path / f"{part.name}.onnx"
        write_graph(finish_graph(simplify_graph(export_part(part, opset, exporter, lowerings)), part.signature), path)
        return OrtEngine(path, threads=1, exact=True)

    return write


def narrowed(part: Part) -> Part:
    """The part with shorter ranges, for a grid of few patches: more take the tiny models long, and show the same."""
    axes = tuple(
        axis if axis.maximum is None else replace(axis, maximum=min(axis.maximum, _largest(axis)))
        for axis in part.signature.axes
    )
    return replace(part, signature=replace(part.signature, axes=axes))


def _largest(axis: Axis) -> int:
    return _PATCHES.get(axis.name, 9) * axis.multiple_of


def verify(part: Part, run: EngineRun) -> PartReport:
    grid = grid_for(narrowed(part).signature)
    return verify_part(part, reference_from_module(part), run, GATES["fp32"], grid)


def failures(part: Part, run: EngineRun, variant: str) -> list[str]:
    """The records that the engine misses."""
    missed = []
    for case in oracle.cases(variant):
        if case.part == part.name:
            found = oracle.valid(case, run(case.inputs)[part.signature.output_names[0]])
            if judge(compare(oracle.valid(case, case.expected), found), GATES["fp32"]):
                missed.append(case.record)
    return missed


def check(part: Part, engine: OrtEngine, variant: str) -> None:
    called = [case.record for case in oracle.cases(variant) if case.part == part.name]
    assert called
    assert not failures(part, engine.run, variant)


@pytest.mark.parametrize(("exporter", "opset"), FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_torchscript(variant: str, exporter: Exporter, opset: int, build: Build, export: Export) -> None:
    for part in build(variant).parts:
        engine = export(part, exporter, opset)
        check(part, engine, variant)
        if opset == 17:
            report = verify(part, engine.run)
            assert report.passed, report.first_failure()


@pytest.mark.parametrize("variant", oracle.GRID)
def test_with_the_operator_resize(variant: str, build: Build, export: Export) -> None:
    part = oracle.part_of(build(variant), "vision_tokens")
    check(part, export(part, "torchscript", 18, RESIZE), variant)


@pytest.mark.parametrize("variant", ["v2_0", "v2_6", "omnilmm"])
def test_dynamo(variant: str, build: Build, export: Export) -> None:
    part = oracle.part_of(build(variant), "vision")
    engine = export(part, "dynamo", 18)
    check(part, engine, variant)
    report = verify(part, engine.run)
    assert report.passed, report.first_failure()
    # Beyond the range that is verified: longer than any slice of ordinary images.
    long = {"batch": 1, "height": 14, "width": 14 * 75, "side": 14 * 50, "packed_width": 14 * 1500}
    inputs = part.examples(long, 0)
    found, expected = engine.run(inputs)["image_features"], oracle.run_module(part, inputs)
    assert not judge(compare(expected, found), GATES["fp32"])


# What must be noticed


def without_antialias(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, vit.VisionTransformer):
            part.form = replace(part.form, antialias=False)


@pytest.mark.parametrize("variant", oracle.GRID)
def test_a_graph_without_antialias_fails(variant: str, build: Build, export: Export) -> None:
    part = oracle.part_of(build(variant), "vision")
    wrong = copy.deepcopy(part.module)
    without_antialias(wrong)
    engine = export(replace(part, module=wrong), "torchscript", 17)
    assert not verify(part, engine.run).passed
    assert any(not record.endswith(("84", "84x84")) for record in failures(part, engine.run, variant))


@pytest.mark.parametrize("variant", oracle.GRID)
def test_a_graph_with_another_cubic_fails(variant: str, build: Build, export: Export) -> None:
    """Antialiased, but with the coefficient of the filter without antialiasing."""
    part = oracle.part_of(build(variant), "vision")
    with mock.patch.object(resample_graph_weights, "CUBIC_ANTIALIAS", -0.75):
        engine = export(part, "torchscript", 17)
    assert not verify(part, engine.run).passed
    assert any(not record.endswith(("84", "84x84")) for record in failures(part, engine.run, variant))


def one_bucket_off(places: Tensor, count: Tensor, starts: Tensor) -> Tensor:
    begun = starts.index_select(0, count).unsqueeze(1) < places.to(torch.float32).unsqueeze(-1)
    return begun.to(torch.int64).sum(dim=-1)


def no_padding(tgt_sizes: Tensor, tokens: int) -> Tensor:
    return torch.ones(tgt_sizes.shape[0], tokens, dtype=torch.int64)


def nothing_hidden(attention_mask: Tensor) -> Tensor:
    return torch.zeros(attention_mask.shape[0], 1, 1, attention_mask.shape[1])


def column_by_column(tgt_sizes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    index, rows = torch.arange(tokens)[None, :], tgt_sizes[:, 0:1]
    column = torch.div(index, rows, rounding_mode="floor")
    return index - column * rows, column


def rows_as_columns(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    return torch.cat([resampler.sine_waves(rows, width // 2), resampler.sine_waves(columns, width // 2)], dim=-1)


def places_of_the_traced_grid(tgt_sizes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    row, column = PATCH_PLACES(torch.tensor([[3, 5]]), tokens)
    return row.expand(len(tgt_sizes), -1), column.expand(len(tgt_sizes), -1)


def table_of_the_traced_grid(table: Tensor, grid: int, rows: int, columns: int, **options: Any) -> Tensor:
    """3 · 5 places, as often as there are patches for them."""
    prefix = options["prefix_tokens"]
    baked = resample_position_embedding(table, grid, 3, 5, **options)
    return torch.cat([baked[:prefix], baked[prefix:][torch.arange(rows * columns) % 15]])


def transposed_table(table: Tensor, grid: int, rows: int, columns: int, **options: Any) -> Tensor:
    return resample_position_embedding(table, grid, columns, rows, **options)


PATCH_PLACES = navit.patch_places
MODULE_FAULTS = [
    ("v2_6", navit, "_bucket", one_bucket_off),
    ("v2_5", navit, "_bucket", one_bucket_off),
    ("v4_5", navit, "padding_mask", nothing_hidden),
    ("v2_6", navit, "padding_mask", nothing_hidden),
    ("v2_6", minicpmv_modules, "patch_mask", no_padding),
    ("v2_6", navit, "patch_places", column_by_column),
    ("v2_6", minicpmv_modules, "patch_places", column_by_column),
    ("v2_0", resampler, "sine_positions", rows_as_columns),
    ("v2_6", minicpmv_modules, "sine_positions", rows_as_columns),
    ("v2_0", vit, "resample_position_embedding", transposed_table),
    ("v2_6", navit, "patch_places", places_of_the_traced_grid),
    ("v2_6", minicpmv_modules, "patch_places", places_of_the_traced_grid),
    ("v2_0", vit, "resample_position_embedding", table_of_the_traced_grid),
    ("omnilmm", vit, "resample_position_embedding", table_of_the_traced_grid),
    ("v1_0", resampler, "resample_position_embedding", table_of_the_traced_grid),
]


@pytest.mark.parametrize(
    ("variant", "where", "name", "fault"), MODULE_FAULTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_faulty_module_fails(variant: str, where: Any, name: str, fault: Any, build: Build) -> None:
    """Both by the verification's grid and by the records."""
    part = oracle.part_of(build(variant), "vision")
    right = reference_from_module(part)

    def faulty(inputs: Arrays) -> Arrays:
        with mock.patch.object(where, name, fault):
            return right(inputs)

    assert not failures(part, right, variant)
    assert failures(part, faulty, variant)
    assert not verify(part, faulty).passed


@pytest.mark.parametrize("variant", ["v2_0", "v2_6"])
def test_a_graph_of_one_size_fails(variant: str, build: Build, export: Export) -> None:
    """The traced sizes became constants: only the batch is an axis of the graph."""
    part = oracle.part_of(build(variant), "vision")
    traced = {"batch": 2, "height": 42, "width": 70, "packed_width": 14 * 15}
    fixed = replace(
        part.signature,
        inputs=tuple(
            replace(spec, shape=tuple(traced.get(axis, axis) if axis != "batch" else axis for axis in spec.shape))
            for spec in part.signature.inputs
        ),
        axes=tuple(axis for axis in part.signature.axes if axis.name == "batch"),
    )
    baked = replace(part, signature=fixed, examples=lambda sizes, seed: part.examples({**traced, **sizes}, seed))
    with ExitStack() as stack:
        if variant == "v2_6":
            stack.enter_context(mock.patch.object(minicpmv_modules, "patch_places", places_of_the_traced_grid))
        engine = export(baked, "torchscript", 17)
    assert not verify(part, engine.run).passed


def test_the_video_of_one_time_is_noticed(build: Build) -> None:
    part = oracle.part_of(build("v4_5"), "video_resampler")
    right = reference_from_module(part)

    def timeless(inputs: Arrays) -> Arrays:
        return right({**inputs, "temporal_ids": np.full_like(inputs["temporal_ids"], -1)})

    missed = failures(part, timeless, "v4_5")
    assert missed == ["output.resampler_temporal_0_7_19", "output.resampler_temporal_pair_plus_single"]
    assert not verify(part, timeless).passed
