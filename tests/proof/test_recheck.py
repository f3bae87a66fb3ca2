from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from vlm_export.bundle.layout import graph_path
from vlm_export.bundle.manifest import Manifest, PartRecord, SourceRecord, VariantRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.bundle.publish import publication
from vlm_export.errors import InputError, VerificationError
from vlm_export.family import Array, Part, reference_from_module
from vlm_export.proof.golden import golden_from_reference, golden_points, write_golden
from vlm_export.proof.points import EngineRun
from vlm_export.proof.recheck import verify_bundle
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.specs.signature import Axis, Signature, TensorSpec

WIDTH = 8
SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", WIDTH)),),
    outputs=(TensorSpec("y", "float32", ("batch", WIDTH)),),
    axes=(Axis("batch"),),
)


def linear_part() -> Part:
    torch.manual_seed(0)

    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        return {"x": np.random.default_rng(seed).standard_normal((sizes["batch"], WIDTH), dtype=np.float32)}

    return Part("linear", nn.Linear(WIDTH, WIDTH).eval().requires_grad_(False), SIGNATURE, examples)


def write_graph(path: Path, part: Part, scale: float) -> None:
    weight, bias = (part.module.get_parameter(name).numpy() * scale for name in ("weight", "bias"))
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def publish(target: Path, *, scale: float = 1.0, with_golden: bool = True, precision: str = "fp32") -> OpenBundle:
    part = linear_part()
    graph = graph_path(part.name, precision)
    with publication(target, overwrite=False) as staging:
        write_graph(staging.file(graph), part, scale)
        if with_golden:
            records = golden_from_reference(part, reference_from_module(part), golden_points(SIGNATURE))
            write_golden(staging.path, part.name, records)
        verification = {"reference": "unpatched eager module", "not_run": ["large sizes: slow"]}
        variants = (VariantRecord(precision, graph, verification=verification),)
        parts = (PartRecord(part.name, SIGNATURE, variants),)
        staging.commit(Manifest("x", SourceRecord("x", "state_dict"), "test", {}, None, None, (), parts))
    return open_bundle(target)


def run_of(bundle: OpenBundle, part: str, precision: str) -> EngineRun:
    return OrtEngine(bundle.model_files(bundle.manifest.part(part).variant(precision)), threads=1, exact=True).run


def test_a_right_graph_passes_and_reports(tmp_path: Path) -> None:
    bundle = publish(tmp_path / "bundle")
    steps: list[tuple[int, int]] = []
    reports = verify_bundle(
        bundle,
        engine_factory=lambda part, precision: run_of(bundle, part, precision),
        engine_name="onnxruntime 9",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 1)]
    (report,) = reports
    report.raise_if_failed()
    data = report.to_json()
    assert data["passed"] is True
    assert data["points"] == {"golden": len(golden_points(SIGNATURE))}
    assert data["reference"] == "recorded outputs of: unpatched eager module"
    assert data["engine"] == "onnxruntime 9"
    ledger = "the ledger of weights: the bundle has none, so weights that were replaced cannot be told"
    assert data["not_run"] == ["at the export: large sizes: slow", ledger]


def test_a_wrong_graph_fails(tmp_path: Path) -> None:
    bundle = publish(tmp_path / "bundle", scale=1.5)
    (report,) = verify_bundle(bundle, engine_factory=lambda part, precision: run_of(bundle, part, precision))
    with pytest.raises(VerificationError, match="linear"):
        report.raise_if_failed()


def test_a_bundle_without_records_proves_nothing(tmp_path: Path) -> None:
    bundle = publish(tmp_path / "bundle", with_golden=False)
    with pytest.raises(InputError, match="no golden records"):
        verify_bundle(bundle, engine_factory=lambda part, precision: run_of(bundle, part, precision))


TORCH_FREE = """
import sys
for name in ("torch", "onnx", "transformers", "torchvision"):
    sys.modules[name] = None  # an import of it fails
from vlm_export.bundle.opened import open_bundle
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.proof.recheck import verify_bundle
from vlm_export.proof.report import format_table
bundle = open_bundle(sys.argv[1])
def run_of(part, precision):
    return OrtEngine(bundle.model_files(bundle.manifest.part(part).variant(precision)), threads=1).run
reports = verify_bundle(bundle, engine_factory=run_of)
assert all(report.passed for report in reports)
print(format_table(reports))
"""


def test_it_runs_without_torch_and_onnx(tmp_path: Path) -> None:
    publish(tmp_path / "bundle")
    command = [sys.executable, "-c", TORCH_FREE, str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "linear" in done.stdout


def test_the_records_are_onnx_standard_test_data(tmp_path: Path) -> None:
    publish(tmp_path / "bundle")
    model = onnx.load(str(tmp_path / "bundle" / graph_path("linear", "fp32")))
    folder = tmp_path / "bundle" / "golden" / "linear" / "test_data_set_0"
    inputs, outputs = (onnx.load_tensor(str(folder / f"{kind}_0.pb")) for kind in ("input", "output"))
    (got,) = ReferenceEvaluator(model).run(None, {inputs.name: numpy_helper.to_array(inputs)})
    np.testing.assert_allclose(np.asarray(got), numpy_helper.to_array(outputs), atol=1e-6)
