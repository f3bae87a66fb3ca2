"""The runtime that a bundle is meant for: its graphs' form, and what the manifest says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import UsageError
from vlm_export.exporting.backends import Target
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.exporting.reverify import verify_against_source
from vlm_export.exporting.stages import Stages
from vlm_export.family import BuildOptions
from vlm_export.runtime.engines.onnxruntime import CPU


@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_target(target: Target | None, checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        opset=18,
        exporter="torchscript",
        target=target,
        with_tokenizer=False,
        build=BuildOptions(dynamic_image_size=True),
        threads=1,
    )
    export_bundle(str(checkpoint), tmp_path / "bundle", options)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.export.target == target
    vision = ir.load(bundle.model_files(bundle.manifest.part("vision").variant("fp32")))
    assert ("Resize" in {node.op_type for node in vision.graph}) == (target == "onnxruntime")
    reports, contract = verify_against_source(bundle, str(checkpoint), (CPU,), 1, Stages())
    assert contract.passed, contract.to_json()
    assert [report.part for report in reports] == ["vision", "text"]
    assert all(report.passed for report in reports)


def test_chosen_parts(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(opset=17, exporter="torchscript", with_tokenizer=False, threads=1)
    export_bundle(str(checkpoint), tmp_path / "bundle", replace(options, parts=("text",)))
    bundle = open_bundle(tmp_path / "bundle")
    assert [part.name for part in bundle.manifest.parts] == ["text"]
    reports, contract = verify_against_source(bundle, str(checkpoint), (CPU,), 1, Stages())
    assert contract.passed, contract.to_json()
    assert [report.part for report in reports] == ["text"]
    with pytest.raises(UsageError, match="no part 'texts'"):
        export_bundle(str(checkpoint), tmp_path / "other", replace(options, parts=("texts",)))
    assert not (tmp_path / "other").exists()


def test_the_preprocessing_part_is_verified_against_the_source_too(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(opset=17, exporter="torchscript", with_tokenizer=False, with_preprocessing=True, threads=1)
    export_bundle(str(checkpoint), tmp_path / "bundle", options)
    reports, contract = verify_against_source(open_bundle(tmp_path / "bundle"), str(checkpoint), (CPU,), 1, Stages())
    assert contract.passed, contract.to_json()
    assert [report.part for report in reports] == ["vision", "text", "vision_from_uint8"]
    assert all(report.passed for report in reports)
