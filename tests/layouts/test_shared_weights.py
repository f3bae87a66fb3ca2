"""Weights of a combined graph: in the encoders' own files for optimum, and said before they are there twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.layouts.package import package
from vlm_export.proof.golden import iterate_golden

DATA = ["onnx/text_model.onnx_data", "onnx/vision_model.onnx_data"]


def test_optimums_combined_graph_reads_the_encoders_files(demo_from_uint8: Path, tmp_path: Path) -> None:
    made = package(demo_from_uint8, tmp_path / "out", "optimum", threads=1)
    (variant,) = made.manifest.part("model").variants
    assert sorted(variant.external_data) == DATA
    assert any("keep the files together" in note for note in made.notes)
    sizes = {name: file.size_bytes for name, file in made.manifest.files.items()}
    assert sizes["onnx/model.onnx"] < sum(sizes[name] for name in DATA) / 50
    # Nothing large stays in the graph.
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False).graph
    assert max(len(entry.raw_data) for entry in graph.initializer) <= 1024
    # transformers.js would look for files of the graph's own name.
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "model.onnx" not in config["transformers.js_config"]["use_external_data_format"]
    vlm_export.verify(tmp_path / "out", threads=1).raise_if_failed()
    run = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    for record in iterate_golden(open_bundle(tmp_path / "out"), "model"):
        names = list(record.outputs)
        for name, found in zip(names, run.run(names, dict(record.inputs)), strict=True):
            np.testing.assert_allclose(found, record.outputs[name], atol=1e-4)


def test_a_second_copy_is_told_before_it_is_written(
    demo_from_uint8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def tell(sentence: str) -> None:
        assert not list(tmp_path.rglob("model.onnx"))
        told.append(sentence)

    package(demo_from_uint8, tmp_path / "small", "transformers.js", threads=1, tell=tell)
    assert told == []
    (tmp_path / "small" / "onnx" / "model.onnx").unlink()
    monkeypatch.setattr("vlm_export.layouts.packing.DEFAULT_EXTERNAL_BYTES", 1 << 20)
    package(demo_from_uint8, tmp_path / "large", "transformers.js", threads=1, tell=tell)
    assert told == ["onnx/model.onnx holds the weights of both encoders a second time, 9.3 MiB"]
