"""A package for OpenVINO: its files, read by OpenVINO alone, give the recorded vectors; other engines refuse it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest

import vlm_export
from vlm_export.bundle.ledger import read_ledger
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import EnvironmentFailure, InputError, UsageError, VerificationError
from vlm_export.layouts.package import package
from vlm_export.proof.golden import iterate_golden

Packaged = Callable[[str], Path]


def test_its_files_give_the_recorded_vectors(packaged: Packaged) -> None:
    """As a program with OpenVINO alone would: `read_model` on the network's file, computed in float32."""
    bundle = open_bundle(packaged("openvino"))
    assert [part.variants[0].file for part in bundle.manifest.parts] == [
        "openvino/vision_model.xml",
        "openvino/text_model.xml",
    ]
    for part in bundle.manifest.parts:
        model = openvino.Core().read_model(bundle.root / part.variants[0].file)
        run = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        records = list(iterate_golden(bundle, part.name))
        assert records
        for record in records:
            found = run(dict(record.inputs))
            for name, expected in record.outputs.items():
                np.testing.assert_allclose(found[name], expected, atol=2e-5)


def test_it_is_a_bundle_that_openvino_runs(packaged: Packaged, demo: Path) -> None:
    texts = ["red circle", "a photo of a blue square"]
    expected = vlm_export.load(demo, threads=1).encode_text(texts)
    model = vlm_export.load(packaged("openvino"), threads=1)
    np.testing.assert_allclose(model.encode_text(texts), expected, atol=2e-6)
    other = vlm_export.load(packaged("openvino"), engine="onnxruntime", threads=1)
    with pytest.raises(UsageError, match="OpenVINO's own form"):
        other.encode_text(texts)
    # Its proof is OpenVINO's: from images and texts to vectors, too.
    result = vlm_export.verify(packaged("openvino"), threads=1)
    result.raise_if_failed()
    assert all(report.engine.startswith("openvino ") for report in result.reports)
    assert {check.stage for check in result.contract.checks} >= {"vision vectors", "text vectors"}


def test_every_constant_of_the_original_is_accounted_for(packaged: Packaged) -> None:
    ledger = read_ledger(open_bundle(packaged("openvino")))
    assert ledger is not None
    for graph in ledger.values():
        weights = [entry for entry in graph.initializers if np.prod(entry.shape) > 64]
        assert len(weights) > 10
        assert all(entry.parameters or entry.transformation for entry in weights)


def test_changed_constants_fail(packaged: Packaged, tmp_path: Path, relist: Callable[[Path], None], demo: Path) -> None:
    package(demo, tmp_path / "copy", "openvino", threads=1)
    data = tmp_path / "copy" / "openvino" / "text_model.bin"
    content = bytearray(data.read_bytes())
    content[1003] ^= 0x80  # the sign of a value of the token embedding
    data.write_bytes(content)
    with pytest.raises(InputError, match="not the one"):
        vlm_export.verify(tmp_path / "copy", threads=1)
    relist(tmp_path / "copy")
    with pytest.raises(VerificationError, match="not the one that was exported") as error:
        vlm_export.verify(tmp_path / "copy", threads=1)
    assert "token_embedding.weight" in error.value.got


@pytest.mark.parametrize(
    "precision", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "int8-static", "w8a16"))]
)
def test_quantised_graphs_keep_their_budget(demo: Path, tmp_path: Path, precision: str) -> None:
    """OpenVINO takes ONNX Runtime's operators of fewer bits apart into its own."""
    vlm_export.quantize(demo, precision, output=tmp_path / "fewer", threads=1)
    made = package(tmp_path / "fewer", tmp_path / "out", "openvino", precision=precision, threads=1)
    assert [report.variant for report in made.reports] == [precision] * 2
    vlm_export.verify(tmp_path / "out", threads=1).raise_if_failed()


def test_half_precision(demo: Path, packaged: Packaged, tmp_path: Path) -> None:
    """Constants of float16, and never float32's rounded on the way out."""
    made = package(demo, tmp_path / "half", "openvino", precision="fp16", threads=1)
    half = made.manifest.files["openvino/vision_model_fp16.bin"].size_bytes
    whole = open_bundle(packaged("openvino")).manifest.files["openvino/vision_model.bin"].size_bytes
    assert 0.49 < half / whole < 0.52
    with pytest.raises(UsageError, match="no form of its files"):
        package(demo, tmp_path / "out", "openvino", precision="bf16")


def test_without_openvino(
    demo: Path, packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packaged("openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentFailure, match="OpenVINO is not installed") as error:
        package(demo, tmp_path / "out", "openvino")
    assert "openvino" in error.value.fix
    assert main(["verify", str(path), "--quiet", "--json"]) == EnvironmentFailure.exit_status
    assert "OpenVINO is not installed" in json.dumps(json.loads(capsys.readouterr().out))
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_not_compared_with_a_checkpoint(packaged: Packaged) -> None:
    with pytest.raises(InputError, match="not compared with a checkpoint"):
        vlm_export.verify(packaged("openvino"), "clip-demo", threads=1)
