"""Every initializer is accounted for, and a weight that was changed afterwards is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faults.graph import GRAPH_FAULTS
from onnx import numpy_helper

from vlm_export.bundle.layout import LEDGER_NAME
from vlm_export.bundle.ledger import NO_LEDGER, check_ledger, ledger_from_bytes
from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError, VerificationError
from vlm_export.exporting.finishing import write_graph
from vlm_export.exporting.pipeline import ExportResult
from vlm_export.exporting.reverify import verify_against_source
from vlm_export.exporting.stages import Stages
from vlm_export.proof.report import PartReport
from vlm_export.runtime.engines.onnxruntime import CPU

DATA = Path(__file__).parents[1] / "data" / "clip"
RARE = 123
HALF_TEXT = "onnx/text_model_fp16.onnx"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, export_fast: Callable[..., ExportResult]) -> Path:
    target = tmp_path_factory.mktemp("ledger") / "bundle"
    export_fast(DATA / "vit_p14" / "state_dict_fp16.pt", target, precisions=("fp32", "fp16"))
    return target


def negate_a_rare_token(path: Path) -> None:
    graph = onnx.load(path)
    (table,) = (tensor for tensor in graph.graph.initializer if tensor.name == "token_embedding.weight")
    values = numpy_helper.to_array(table).copy()
    values[RARE] *= -1
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(graph, path)


def hash_again(bundle: Path) -> None:
    """The manifest with the sizes and digests of the files as they are now."""
    path = bundle / "vlm_export.json"
    manifest = json.loads(path.read_text())
    for name, record in manifest["files"].items():
        raw = (bundle / name).read_bytes()
        record.update(size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    path.write_text(json.dumps(manifest))


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(bundle, copy)
    for name in ("text_model.onnx", "text_model_fp16.onnx"):
        negate_a_rare_token(copy / "onnx" / name)
    hash_again(copy)
    return copy


def test_every_initializer_is_in_the_ledger(bundle: Path) -> None:
    ledger = ledger_from_bytes((bundle / LEDGER_NAME).read_bytes(), LEDGER_NAME)
    assert len(ledger) == 4
    for file, graph in ledger.items():
        stored = onnx.load(bundle / file).graph.initializer
        assert [entry.name for entry in graph.initializers] == [tensor.name for tensor in stored]
        for entry, tensor in zip(graph.initializers, stored, strict=True):
            values = numpy_helper.to_array(tensor)
            assert entry.sha256 == hashlib.sha256(values.tobytes()).hexdigest()
            assert entry.shape == values.shape
            assert entry.transformation
            assert entry.checkpoint or values.nbytes < 2048
    entries = {entry.name: entry for entry in ledger["onnx/text_model_fp16.onnx"].initializers}
    hidden = entries["blocks.0.mlp.fc1.weight.transposed"]
    assert [(tensor.key, tensor.transformation) for tensor in hidden.checkpoint] == [
        ("transformer.resblocks.0.mlp.c_fc.weight", "as stored, cast from float16")
    ]
    assert hidden.transformation == "transposed, cast to float16"


def test_the_right_bundle_passes(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for part in opened.manifest.parts:
        for variant in part.variants:
            assert check_ledger(opened, variant) == ()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_rare_token_s_row_is_found_without_the_source(damaged: Path, precision: str) -> None:
    opened = open_bundle(damaged)
    with pytest.raises(VerificationError) as caught:
        check_ledger(opened, opened.manifest.part("text").variant(precision))
    assert "token_embedding.weight (made of token_embedding.weight) has other values" in caught.value.got


def test_a_rare_token_s_row_is_named_with_the_source(damaged: Path) -> None:
    source = str(DATA / "vit_p14" / "state_dict_fp16.pt")
    with pytest.raises(VerificationError) as caught:
        verify_against_source(open_bundle(damaged), source, (CPU,), 1, Stages(), "fp32")
    assert f"token_embedding.weight (checkpoint: token_embedding.weight): 1 of 200 rows differ ({RARE})" in str(
        caught.value
    )


@pytest.fixture
def with_another_epsilon(bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "epsilon"
    shutil.copytree(bundle, copy)
    graph = ir.load(copy / HALF_TEXT)
    next(fault for fault in GRAPH_FAULTS if "epsilon" in fault.name).plant(graph, 0)
    write_graph(graph, copy / HALF_TEXT)
    hash_again(copy)
    return copy


def test_another_attribute_of_a_node_is_found_without_the_source(with_another_epsilon: Path) -> None:
    opened = open_bundle(with_another_epsilon)
    with pytest.raises(VerificationError) as caught:
        check_ledger(opened, opened.manifest.part("text").variant("fp16"))
    assert (caught.value.where, caught.value.got) == (HALF_TEXT, "its nodes, their attributes or its interface differ")


def test_a_float16_graph_is_computed_in_float32_with_the_numbers_that_the_ledger_keeps(
    bundle: Path, with_another_epsilon: Path
) -> None:
    reports = {report.part: report for report in _verified(bundle)}
    for report in reports.values():
        assert report.passed
        assert report.not_run == ()
        assert report.unrounded is not None
        assert report.unrounded.floor is not None
        assert report.unrounded.floor.rule == "fp32"
    # As if the graph had been exported so.
    ledger = with_another_epsilon / LEDGER_NAME
    old, new = ((root / HALF_TEXT).read_bytes() for root in (bundle, with_another_epsilon))
    ledger.write_text(ledger.read_text().replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()))
    hash_again(with_another_epsilon)
    (report,) = (report for report in _verified(with_another_epsilon) if report.part == "text")
    assert report.unrounded is not None
    assert not report.unrounded.passed
    with pytest.raises(VerificationError, match="fp16 unrounded"):
        report.unrounded.raise_if_failed()


def _verified(bundle: Path) -> list[PartReport]:
    source = str(DATA / "vit_p14" / "state_dict_fp16.pt")
    return verify_against_source(open_bundle(bundle), source, (CPU,), 1, Stages(), "fp16")[0]


def test_norms_that_were_folded_are_computed_again(tmp_path: Path, export_fast: Callable[..., ExportResult]) -> None:
    source, target = DATA / "rn_tiny" / "jit_archive.pt", tmp_path / "bundle"
    export_fast(source, target, parts=("vision",))
    ledger = ledger_from_bytes((target / LEDGER_NAME).read_bytes(), LEDGER_NAME)["onnx/vision_model.onnx"]
    folded = [entry for entry in ledger.initializers if entry.transformation == "batch norm folded in"]
    assert folded
    assert all(any("running_var" in tensor.key for tensor in entry.checkpoint) for entry in folded)
    graph = onnx.load(target / "onnx" / "vision_model.onnx")
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("weight.folded"))
    values = numpy_helper.to_array(weight).copy()
    values[2] = np.nextafter(values[2], np.float32(9))
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, target / "onnx" / "vision_model.onnx")
    hash_again(target)
    with pytest.raises(VerificationError) as caught:
        verify_against_source(open_bundle(target), str(source), (CPU,), 1, Stages())
    assert "rows differ (2)" in str(caught.value)


def test_a_bundle_without_a_ledger_says_so_and_a_malformed_one_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / LEDGER_NAME).write_text('{"schema": 1, "graphs": [{"file": "x"}]}')
    hash_again(copy)
    opened = open_bundle(copy)
    variant = opened.manifest.parts[0].variants[0]
    with pytest.raises(InputError, match="missing fields"):
        check_ledger(opened, variant)
    manifest = json.loads((copy / "vlm_export.json").read_text())
    del manifest["files"][LEDGER_NAME]
    (copy / "vlm_export.json").write_text(json.dumps(manifest))
    assert check_ledger(open_bundle(copy), variant) == (NO_LEDGER,)
