"""Verification of parts larger than the memory: weights stay on disk, little is run, and the report says so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm_export.exporting import verification as verification_module
from vlm_export.exporting.pipeline import ExportResult
from vlm_export.exporting.verification import PartVerification
from vlm_export.family import Model
from vlm_export.proof.points import Arrays

# Opens a chain of 12 matrices of 16 MiB, runs it, and prints by how many MiB the anonymous memory grew at most.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
from vlm_export.exporting.stages import Stages
from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.exporting.finishing import write_graph
from vlm_export.runtime.engines.onnxruntime import OrtEngine

WIDTH, DTYPE, CAST = 2048, getattr(np, sys.argv[3]), sys.argv[3] == "float16"
path = Path(sys.argv[1]) / "graph.onnx"


def build():
    x = ir.Value(name="x", shape=ir.Shape(["batch", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    kind = ir.DataType.FLOAT16 if CAST else ir.DataType.FLOAT
    nodes, weights, value = [ir.node("Cast", [x], {"to": kind})], [], None
    value = nodes[0].outputs[0]
    for i in range(12):
        weight = (np.random.default_rng(i).standard_normal((WIDTH, WIDTH)) / 45).astype(DTYPE)
        weights.append(ir.Value(name=f"w{i}", const_value=ir.tensor(weight, name=f"w{i}")))
        nodes.append(ir.node("MatMul", [value, weights[-1]]))
        value = nodes[-1].outputs[0]
    nodes.append(ir.node("Cast", [value], {"to": ir.DataType.FLOAT}))
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["batch", WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="chain")
    write_graph(ir.Model(graph, ir_version=10), path, 1 << 20)


if sys.argv[2] == "build":
    build()
else:
    stages = Stages()
    before = anonymous_bytes()
    with stages.stage("run"):
        engine = OrtEngine(path, threads=1, exact=True, mapped=sys.argv[2] == "mapped")
        for batch in (1, 2):
            engine.run({"x": np.ones((batch, WIDTH), np.float32)})
    print((stages.records[0].peak_anonymous_bytes - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize(("dtype", "weights_mib"), [("float32", 192), ("float16", 96)])
def test_a_mapped_engine_takes_no_copy_of_the_weights(tmp_path: Path, dtype: str, weights_mib: int) -> None:
    def grown_mib(mode: str) -> int:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), mode, dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout or 0)

    grown_mib("build")
    assert grown_mib("plain") > 0.8 * weights_mib
    # One matrix as float32 at a time, for a processor that has no float16 arithmetic, and what an engine takes itself.
    assert grown_mib("mapped") < 50


@pytest.fixture
def all_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part counts as huge, and every graph stays mapped."""
    monkeypatch.setattr(verification_module, "HUGE_PART_BYTES", 0)
    monkeypatch.setattr("vlm_export.proof.engine.keeps_weights_mapped", lambda _: True)


@pytest.mark.usefixtures("all_huge")
def test_the_reference_comes_first_and_once(oracle_model: Callable[[str], Model]) -> None:
    model = oracle_model("vit_p14/state_dict_fp32.pt")
    (part,) = (part for part in model.parts if part.name == "text")
    verification = PartVerification(part, model, None, [])
    own, order = model.references["text"](), ["start"]

    def engine(inputs: Arrays) -> dict[str, np.ndarray]:
        order.append("engine")
        return own(inputs)

    loaded = verification.load_reference()

    def reference(inputs: Arrays) -> dict[str, np.ndarray]:
        order.append("reference")
        return own(inputs)

    loaded.reference = reference  # type: ignore[attr-defined]  # huge: a CachedReference
    for precision in ("fp32", "fp16"):
        report = verification.run(engine, "engine", loaded, lambda done, total: None, precision, mapped=True)
        report.raise_if_failed()
    assert order == ["start", *["reference"] * 3, *["engine"] * 6]
    left_out, mapped, itself = report.not_run
    batches = "the runtime's batches of 4, 8, 16, 32, 64"
    assert left_out.startswith(
        f"4 of 7 grid points (batch 3, 5; sequence 3; seed 1, 2) and {batches}: the weights take"
    )
    assert "optimisations" in mapped
    assert "itself" in itself


@pytest.mark.usefixtures("all_huge")
def test_the_bundle_says_what_was_not_run(
    tmp_path: Path, checkpoint: Path, export_fast: Callable[..., ExportResult]
) -> None:
    result = export_fast(checkpoint, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "vlm_export.json").read_text())
    for part in manifest["parts"]:
        (variant,) = part["variants"]
        told = variant["verification"]["not_run"]
        assert any("grid points" in text for text in told)
        assert any("optimisations" in text for text in told)
        assert "mapped" in variant["verification"]["engine"]
    assert all(report.passed for report in result.reports)
    command = [sys.executable, "-m", "vlm_export.cli.main", "verify", str(tmp_path / "bundle"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "not run: vision fp32: at the export: " in done.stdout


def test_a_small_model_is_verified_whole(
    tmp_path: Path, checkpoint: Path, export_fast: Callable[..., ExportResult]
) -> None:
    assert all(report.not_run == () for report in export_fast(checkpoint, tmp_path / "bundle").reports)
