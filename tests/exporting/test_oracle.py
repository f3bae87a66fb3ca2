"""Exported graphs against what the original implementation recorded, for each file, back end and opset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from vlm_export.exporting.backends import OPSETS, Exporter, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import Model, Part, reference_from_module
from vlm_export.graph.core.interface import GRAPH_AXES
from vlm_export.runtime.engines.onnxruntime import OrtEngine

Array = npt.NDArray[Any]
Same = Callable[..., None]
FILES = ("rn_tiny/jit_archive.pt", "vit_w128/jit_archive.pt", "vit_p14/state_dict_fp32.pt")
MATRIX = [
    (file, exporter, opset)
    for file in FILES
    for exporter in get_args(Exporter)
    for opset in (14, 17, 18, 20)
    if opset in OPSETS[exporter]
]
ENDS = [("vit_p14/state_dict_fp32.pt", "torchscript", 11), ("vit_p14/state_dict_fp32.pt", "dynamo", 23)]
# Other weights in the same graphs.
HALF = [("vit_p14/state_dict_fp16.pt", "torchscript", 17), ("vit_p14/state_dict_fp16.pt", "dynamo", 18)]


@dataclass(frozen=True)
class Exported:
    """Both graphs of a model, as published and as the back end wrote them."""

    model: Model
    opset: int
    simplified: dict[str, OrtEngine]
    plain: dict[str, OrtEngine]

    def part(self, name: str) -> Part:
        return next(part for part in self.model.parts if part.name == name)

    def graph(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.simplified[name].path)


@pytest.mark.parametrize(("file", "exporter", "opset"), MATRIX + ENDS + HALF)
def test_export(
    file: str,
    exporter: Exporter,
    opset: int,
    tmp_path: Path,
    oracle_model: Callable[[str], Model],
    oracle_record: Callable[[str], dict[str, Array]],
    assert_same: Same,
) -> None:
    """One test for each export, whatever it shows, because exporting is what takes the time."""
    exported = _export(oracle_model(file), exporter, opset, tmp_path)
    record = oracle_record(file)
    check_outputs_equal_the_record(exported, record, assert_same)
    check_text_cut_after_its_end_equals_the_record(exported, record, assert_same)
    check_every_size_equals_the_eager_module(exported, assert_same)
    check_the_interface_is_the_signature(exported)
    check_operators(exported)


def _export(model: Model, exporter: Exporter, opset: int, folder: Path) -> Exported:
    simplified, plain = {}, {}
    for part in model.parts:
        raw = export_part(part, opset, exporter)
        simplified[part.name] = _engine(simplify_graph(raw), part, folder / f"{part.name}.onnx")
        plain[part.name] = _engine(raw, part, folder / f"{part.name}_plain.onnx")
    return Exported(model, opset, simplified, plain)


def _engine(graph: ir.Model, part: Part, path: Path) -> OrtEngine:
    write_graph(finish_graph(graph, part.signature), path)
    return OrtEngine(path, threads=1, exact=True)


def check_outputs_equal_the_record(exported: Exported, record: dict[str, Array], assert_same: Same) -> None:
    for engines in (exported.simplified, exported.plain):
        image = engines["vision"].run({"pixel_values": record["input.image"]})["image_embeds"]
        assert_same(image, record["output.image_features"])
        text = engines["text"].run({"input_ids": record["input.text"]})["text_embeds"]
        assert_same(text, record["output.text_features"])


def check_text_cut_after_its_end_equals_the_record(
    exported: Exported, record: dict[str, Array], assert_same: Same
) -> None:
    ids, expected = record["input.text"], record["output.text_features"]
    lengths = ids.argmax(axis=1) + 1
    assert lengths.min() < ids.shape[1], "the record has no padded text"
    run = exported.simplified["text"].run
    for row, features, length in zip(ids, expected, lengths, strict=True):
        assert_same(run({"input_ids": row[None, :length]})["text_embeds"], features[None])
    assert_same(run({"input_ids": ids[:, : lengths.max()]})["text_embeds"], expected)


def check_every_size_equals_the_eager_module(exported: Exported, assert_same: Same) -> None:
    context = exported.part("text").signature.axis("sequence").maximum
    assert context is not None
    for engines in (exported.simplified, exported.plain):
        for rows in (1, 2, 3, 5):
            _compare(exported, engines, "vision", {"batch": rows}, assert_same)
            for tokens in (1, 2, 7, context):
                _compare(exported, engines, "text", {"batch": rows, "sequence": tokens}, assert_same)


def _compare(exported: Exported, engines: dict[str, OrtEngine], name: str, sizes: dict[str, int], same: Same) -> None:
    part = exported.part(name)
    inputs = part.examples(sizes, seed=sum(sizes.values()))
    expected = reference_from_module(part)(inputs)
    got = engines[name].run(inputs)
    assert list(got) == list(part.signature.output_names)
    for key, value in expected.items():
        same(got[key], value)


def check_the_interface_is_the_signature(exported: Exported) -> None:
    for part in exported.model.parts:
        graph = exported.graph(part.name)
        assert {entry.domain: entry.version for entry in graph.opset_import} == {"": exported.opset}
        for values, specs in (
            (graph.graph.input, part.signature.inputs),
            (graph.graph.output, part.signature.outputs),
        ):
            found = [(value.name, tuple(_axes(value))) for value in values]
            assert found == [
                (spec.name, tuple(GRAPH_AXES.get(str(axis), axis) for axis in spec.shape)) for spec in specs
            ]
        onnx.checker.check_model(graph, full_check=True)


def _axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def check_operators(exported: Exported) -> None:
    for part in exported.model.parts:
        after = Counter(node.op_type for node in exported.graph(part.name).graph.node)
        before = Counter(node.op_type for node in onnx.load(exported.plain[part.name].path).graph.node)
        # TensorRT rejects Attention or computes it wrongly, so the default opset must not have it.
        assert (after["Attention"] > 0) == (before["Attention"] > 0) == (exported.opset >= 23)
        assert after["BatchNormalization"] == 0
        assert after.total() < before.total()
