"""Exported interpolation in the engines against torch, at sizes that the export has not seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_export.exporting.backends import Exporter, Lowerings, Target, choose_lowerings, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.lowerings.resample_weights import Filter
from vlm_export.family import Part
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.engines.openvino import OpenVinoEngine
from vlm_export.specs.signature import Signature, TensorSpec

Array = npt.NDArray[Any]
Engine = OrtEngine | OpenVinoEngine
ORIGINAL = F.interpolate
RESIZE = Lowerings(interpolation="resize-op")
BACK_ENDS: tuple[tuple[Exporter, int], ...] = (
    ("torchscript", 11),
    ("torchscript", 14),
    ("torchscript", 17),
    ("torchscript", 18),
    ("torchscript", 20),
    ("dynamo", 18),
    ("dynamo", 20),
)
FACTORS = (0.7, 1.3)


def options_of(form: Filter) -> dict[str, Any]:
    return {"mode": form.mode, "antialias": form.antialias, "align_corners": form.align_corners}


def relative_error(got: Array, expected: Tensor, x: Array) -> float:
    """max-abs over the largest input; infinite when the shape differs, NaN stays."""
    if got.shape != tuple(expected.shape):
        return float("inf")
    return float(np.abs(got - expected.numpy()).max() / np.abs(x).max())


def within(error: float, tolerance: float) -> bool:
    return error <= tolerance


@pytest.fixture
def compare(
    draw_case: Callable[..., Any], noise: Callable[..., Array], reference: Callable[..., Tensor]
) -> Callable[..., float]:
    """Runs a graph of dynamic sizes on random cases; the largest error over its tolerance."""

    def worst(
        engines: Mapping[str, Engine],
        form: Filter,
        rng: np.random.Generator,
        cases: int,
        tolerance: Callable[[Any], float] = lambda case: 1e-5,
        **factors: Any,
    ) -> float:
        largest = 0.0
        for _ in range(cases):
            case = draw_case(rng)
            shape = (case.shape[0], 3, *case.shape[2:])
            if factors and min(shape[2:]) < 2:
                continue
            x = noise(rng, shape)
            feeds = {"pixels": x}
            if not factors:
                feeds["like"] = np.zeros((shape[0], 1, *case.size), np.float32)
            expected = reference(torch.from_numpy(x), **(factors or {"size": case.size}), **options_of(form))
            for name, engine in engines.items():
                ratio = relative_error(engine.run(feeds)["y"], expected, x) / tolerance(case)
                assert not np.isnan(ratio), f"{name} {case} {form}"
                largest = max(largest, ratio)
        return largest

    return worst


@pytest.fixture
def export_dynamic(build_part: Callable[..., Part], export_graph: Callable[..., Any]) -> Callable[..., onnx.ModelProto]:
    def export(exporter: Exporter, opset: int, form: Filter, lowerings: Lowerings | None = None, **how: Any) -> Any:
        return export_graph(build_part(form, **how), exporter, opset, lowerings)

    return export


def engines_for(path: Path, openvino: bool = True) -> dict[str, Engine]:
    engines: dict[str, Engine] = {"onnxruntime": OrtEngine(path, threads=1)}
    return engines | {"openvino": OpenVinoEngine(path, threads=1)} if openvino else engines


@pytest.fixture
def load_engines(save_graph: Callable[[onnx.ModelProto], Path]) -> Callable[..., dict[str, Engine]]:
    return lambda graph, openvino=True: engines_for(save_graph(graph), openvino)


def operators(graph: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("opset", [11, 18])
def test_sizes_never_traced(
    opset: int,
    filters: tuple[Filter, ...],
    export_dynamic: Callable[..., onnx.ModelProto],
    load_engines: Callable[..., dict[str, Engine]],
    compare: Callable[..., float],
) -> None:
    rng = np.random.default_rng(opset)
    for form in filters:
        for how in ({}, {"scale_factor": FACTORS}, {"scale_factor": FACTORS, "recompute_scale_factor": True}):
            graph = export_dynamic("torchscript", opset, form, **how)
            assert "Resize" not in operators(graph)
            # OpenVINO takes its time to compile; the full sweep asks it everything.
            engines = load_engines(graph, openvino=opset == 18 and not how)
            assert within(compare(engines, form, rng, 4 if how else 10, **how), 1), f"{form} {how}"


@pytest.mark.parametrize(
    ("form", "how"),
    [
        (Filter("bicubic", antialias=True), {}),
        (Filter("bilinear"), {"scale_factor": FACTORS}),
        (Filter("bicubic", align_corners=True), {"scale_factor": FACTORS, "recompute_scale_factor": True}),
    ],
)
def test_sizes_never_traced_by_dynamo(
    form: Filter,
    how: dict[str, Any],
    export_dynamic: Callable[..., onnx.ModelProto],
    load_engines: Callable[..., dict[str, Engine]],
    compare: Callable[..., float],
) -> None:
    engines = load_engines(export_dynamic("dynamo", 18, form, **how))
    assert within(compare(engines, form, np.random.default_rng(5), 15, **how), 1)


def resize_tolerance(case: Any) -> float:
    """A runtime rounds the scale, its product or quotient, and the difference to float32: four halves of an ulp.

    White noise turns an error of a coordinate into up to twice its value.
    """
    largest = int(max(*case.shape[2:], *case.size))
    return max(1e-5, 2.0**-21 * largest)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 18), ("torchscript", 20), ("dynamo", 18)])
def test_resize(
    exporter: Exporter,
    opset: int,
    filters: tuple[Filter, ...],
    export_dynamic: Callable[..., onnx.ModelProto],
    save_graph: Callable[[onnx.ModelProto], Path],
    compare: Callable[..., float],
) -> None:
    rng = np.random.default_rng(6)
    for form in filters if exporter == "torchscript" else filters[-2:]:
        graph = export_dynamic(exporter, opset, form, RESIZE)
        assert ("Resize" in operators(graph)) == (not (form.antialias and form.align_corners))
        engine = OrtEngine(save_graph(graph), threads=1)
        assert within(compare({"onnxruntime": engine}, form, rng, 8, resize_tolerance), 1), f"{form}"


@pytest.mark.parametrize(
    ("attribute", "value"), [("antialias", 0), ("cubic_coeff_a", -0.75), ("exclude_outside", 0)], ids=lambda v: str(v)
)
def test_wrong_attributes_exceed_the_tolerance(
    attribute: str,
    value: float,
    export_dynamic: Callable[..., onnx.ModelProto],
    save_graph: Callable[[onnx.ModelProto], Path],
    compare: Callable[..., float],
) -> None:
    """The same comparison as `test_resize`, whose graph passes."""
    form = Filter("bicubic", antialias=True)
    graph = export_dynamic("torchscript", 18, form, RESIZE)
    (node,) = (node for node in graph.graph.node if node.op_type == "Resize")
    (found,) = (entry for entry in node.attribute if entry.name == attribute)
    node.attribute.remove(found)
    node.attribute.append(onnx.helper.make_attribute(attribute, value))
    engine = OrtEngine(save_graph(graph), threads=1)
    assert not within(compare({"onnxruntime": engine}, form, np.random.default_rng(7), 12, resize_tolerance), 20)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 11), ("torchscript", 18), ("dynamo", 18)])
def test_fixed_sizes_are_constant_matrices(
    exporter: Exporter,
    opset: int,
    filters: tuple[Filter, ...],
    build_part: Callable[..., Part],
    draw_case: Callable[..., Any],
    noise: Callable[..., Array],
    reference: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(8)
    for form in filters * 2 if exporter == "torchscript" else filters[-1:]:
        case = draw_case(rng)
        part = build_part(form, case=case)
        raw = export_part(part, opset, exporter)
        for name, graph in (("raw", finish_graph(raw.clone(), part.signature)), ("simplified", _simplified(raw, part))):
            assert not {node.op_type for node in graph.graph} & {"Range", "Floor", "Where", "Div", "Resize"}
            path = tmp_path / f"{name}.onnx"
            write_graph(graph, path)
            x = noise(rng, case.shape)
            expected = reference(torch.from_numpy(x), size=case.size, **options_of(form))
            for engine, loaded in engines_for(path, openvino=opset == 18 and name == "simplified").items():
                error = relative_error(loaded.run({"pixels": x})["y"], expected, x)
                assert within(error, 1e-5), f"{name} {engine} {case} {form}: {error:.1e}"


def _simplified(raw: ir.Model, part: Part) -> ir.Model:
    return finish_graph(simplify_graph(raw), part.signature)


def test_below_opset_18_there_is_no_resize(export_dynamic: Callable[..., onnx.ModelProto]) -> None:
    assert "Resize" not in operators(export_dynamic("torchscript", 17, Filter("bicubic", True), RESIZE))


def test_targets_choose_the_form() -> None:
    targets: tuple[Target, ...] = get_args(Target)
    chosen = {target: choose_lowerings(target).interpolation for target in targets}
    assert chosen == {"onnxruntime": "resize-op", "openvino": "matmul", "tensorrt": "matmul", "web": "matmul"}
    assert choose_lowerings(None).interpolation == "matmul"


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("lowerings", [Lowerings(), RESIZE], ids=["matmul", "resize-op"])
def test_export_leaves_torch_as_it_was(
    exporter: Exporter, lowerings: Lowerings, export_dynamic: Callable[..., onnx.ModelProto]
) -> None:
    # Namespaces that torch itself loads with its first export.
    signature = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),), ())
    export_part(
        Part("vision", torch.nn.ReLU(), signature, lambda sizes, seed: {"x": np.zeros(2, np.float32)}), 18, exporter
    )
    operations = set(dir(torch.ops))
    export_dynamic(exporter, 18, Filter("bilinear", True), lowerings)
    assert F.interpolate is ORIGINAL
    assert set(dir(torch.ops)) == operations


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "opset"), BACK_ENDS)
def test_full_sweep_of_dynamic_sizes(
    exporter: Exporter,
    opset: int,
    filters: tuple[Filter, ...],
    export_dynamic: Callable[..., onnx.ModelProto],
    load_engines: Callable[..., dict[str, Engine]],
    compare: Callable[..., float],
) -> None:
    """2,016 cases of given sizes and 1,120 of factors over all back ends, in both engines."""
    rng = np.random.default_rng(100 + opset)
    ways: tuple[dict[str, Any], ...] = ({}, {"scale_factor": FACTORS}, {"scale_factor": 2.5})
    for form, how in itertools.product(filters, ways):
        engines = load_engines(export_dynamic(exporter, opset, form, **how))
        ratio = compare(engines, form, rng, 10 if how else 36, **how)
        assert within(ratio, 1), f"{form} {how}: {ratio:.2f} of the tolerance"


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "opset"), BACK_ENDS)
def test_full_sweep_of_fixed_sizes(
    exporter: Exporter,
    opset: int,
    filters: tuple[Filter, ...],
    build_part: Callable[..., Part],
    export_graph: Callable[..., onnx.ModelProto],
    draw_case: Callable[..., Any],
    noise: Callable[..., Array],
    reference: Callable[..., Tensor],
    load_engines: Callable[..., dict[str, Engine]],
) -> None:
    rng = np.random.default_rng(200 + opset)
    for form in filters * (10 if exporter == "torchscript" else 2):
        case = draw_case(rng)
        engines = load_engines(export_graph(build_part(form, case=case), exporter, opset))
        x = noise(rng, case.shape)
        expected = reference(torch.from_numpy(x), size=case.size, **options_of(form))
        for name, engine in engines.items():
            error = relative_error(engine.run({"pixels": x})["y"], expected, x)
            assert within(error, 1e-5), f"{name} {case} {form}: {error:.1e}"


@pytest.mark.slow
def test_torchs_own_lowering_is_not_as_exact(
    build_part: Callable[..., Part],
    save_graph: Callable[[onnx.ModelProto], Path],
    compare: Callable[..., float],
) -> None:
    """Why ours replaces it always: the probe that the choice would rest on finds none within the tolerance."""
    for form in (Filter("bicubic", True), Filter("bicubic"), Filter("bilinear", True)):
        part = build_part(form)
        axes = {name: torch.export.Dim(name, max=4096) for name in ("batch", "height", "width", "rows", "columns")}
        shapes = tuple(
            {i: axes[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str)}
            for spec in part.signature.inputs
        )
        examples = (torch.zeros(2, 3, 9, 11), torch.zeros(2, 1, 6, 7))
        program = torch.onnx.export(
            part.module.eval(),
            examples,
            dynamo=True,
            opset_version=18,
            input_names=["pixels", "like"],
            output_names=["y"],
            dynamic_shapes=shapes,
            verbose=False,
        )
        assert program is not None
        engine = OrtEngine(save_graph(program.model_proto), threads=1)
        assert not within(compare({"onnxruntime": engine}, form, np.random.default_rng(9), 10), 1)
