"""Quantised variants of the demo bundle: they load, are small, lose what they say, and are refused over budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import vlm_export
from vlm_export.bundle.ledger import found_ledger, ledger_to_bytes, read_ledger
from vlm_export.bundle.loss import LossRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, UsageError, VerificationError
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.precision.quantised import Calibration, calibrated_tensors, quantise
from vlm_export.precision.recipes import RECIPES
from vlm_export.proof.metrics import Array
from vlm_export.quantizing.losses import output_losses, row_cosines
from vlm_export.quantizing.result import OverBudgetError
from vlm_export.quantizing.samples import NamedSamples, sample_set
from vlm_export.quantizing.task_runs import run_tasks
from vlm_export.runtime.engines.choice import EngineName
from vlm_export.runtime.engines.onnxruntime import OrtEngine

PRECISIONS = ("int8", "int8-static", "w8a16", "int4")
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")
# Of the float32 graph's bytes: the demo's patch convolution, which stays, is 7 % of its image encoder.
LARGEST = {"int8": 0.34, "int8-static": 0.34, "w8a16": 0.36, "int4": 0.26}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(bundle: OpenBundle) -> Iterator[tuple[str, LossRecord]]:
    for part in bundle.manifest.parts:
        for variant in part.variants:
            if variant.loss is not None:
                yield part.name, variant.loss


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_variant_loads_and_runs_and_float32_stays_the_default(
    quantised: Callable[[str], Path], demo: Path, precision: str
) -> None:
    bundle = quantised(precision)
    texts = ["a red circle", "two blue squares"]
    before, after = vlm_export.load(demo), vlm_export.load(bundle, precision=precision)
    assert vlm_export.load(bundle).precision == "fp32"
    assert after.precision == precision
    assert after.identity == before.identity
    cosines = row_cosines(before.encode_text(texts), after.encode_text(texts))
    assert 0.95 < cosines.min() < 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_computes_what_onnxruntime_does(quantised: Callable[[str], Path], precision: str) -> None:
    bundle = quantised(precision)
    ours, theirs = (vlm_export.load(bundle, precision=precision, engine=engine) for engine in ENGINES)
    image, texts = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), ["a red circle", "a dog"]
    assert row_cosines(ours.encode_image(image), theirs.encode_image(image)).min() > 0.9999
    assert row_cosines(ours.encode_text(texts), theirs.encode_text(texts)).min() > 0.9999


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_small_and_proves_itself(quantised: Callable[[str], Path], precision: str) -> None:
    bundle = quantised(precision)
    for _, loss in losses(open_bundle(bundle)):
        assert loss.measured.size_share <= LARGEST[precision]
    vlm_export.verify(bundle).raise_if_failed()
    (only,) = {report.variant for report in vlm_export.verify(bundle, precision=precision).reports}
    assert only == precision


def test_the_recorded_loss_is_what_is_measured_again(quantised: Callable[[str], Path]) -> None:
    bundle = open_bundle(quantised("int8"))
    samples = sample_set(bundle, NamedSamples())
    feeds = run_tasks(bundle, samples, {}, 1).feeds
    for name, loss in losses(bundle):
        part = bundle.manifest.part(name)
        float32, int8 = (OrtEngine(bundle.graph_file(part.variant(p)), threads=1) for p in ("fp32", "int8"))
        again = output_losses((float32.run(one), int8.run(one)) for one in feeds[name])
        for output, recorded in loss.measured.outputs.items():
            assert again[output].cosine == pytest.approx(recorded.cosine, abs=1e-6)
            assert again[output].mean_cosine == pytest.approx(recorded.mean_cosine, abs=1e-6)
        assert (loss.samples.images, loss.samples.texts) == (len(samples.images), len(samples.texts))


def test_the_naive_recipe_stands_beside(quantised: Callable[[str], Path]) -> None:
    found = dict(losses(open_bundle(quantised("int8"))))
    for loss in found.values():
        assert loss.naive is not None
        assert loss.naive.outputs.keys() == loss.measured.outputs.keys()
    vision = found["vision"]
    assert vision.naive is not None
    assert vision.measured.outputs["image_embeds"].cosine > vision.naive.outputs["image_embeds"].cosine


def test_what_is_not_measured_is_told(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget's key that nothing here answers is refused; what the user names beyond what is taken is told."""
    monkeypatch.setattr("vlm_export.quantizing.samples._MOST_TEXTS", 2)
    (tmp_path / "texts.txt").write_text("a red circle\na blue circle\na green circle\n", encoding="utf-8")
    options: dict[str, Any] = {
        "texts": tmp_path / "texts.txt",
        "parts": ("text",),
        "threads": 1,
    }
    before = contents(copied)
    for key in ("exact-match=0.9", "zero-shot=1pp", "retrieval@1=1pp"):
        with pytest.raises(UsageError, match=f"states {key.partition('=')[0]}, and nothing here measures it"):
            vlm_export.quantize(copied, "int8", budget=key, **options)
    assert contents(copied) == before
    vlm_export.quantize(copied, "int8", **options)
    ((_, loss),) = losses(open_bundle(copied))
    assert "of your 3 texts the first 2 were taken" in loss.notes


def test_over_budget_is_refused_with_the_figure_and_nothing_is_touched(copied: Path) -> None:
    before = contents(copied)
    with pytest.raises(OverBudgetError) as caught:
        vlm_export.quantize(copied, "int4", budget="cosine=0.9999", threads=1)
    error = caught.value
    assert isinstance(error, VerificationError)
    assert "part 'vision'" in str(error)
    assert "0.9999" in error.expected
    assert float(error.got) < 0.9999
    assert "w8a16" in error.fix
    assert all(loss.record.naive is not None for loss in error.losses)
    assert contents(copied) == before
    assert [path.name for path in copied.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_in_place_is_one_step_and_a_second_time_replaces(copied: Path) -> None:
    vlm_export.quantize(copied, "int8", threads=1)
    vlm_export.quantize(copied, "int4", parts=["text"], threads=1)
    again = vlm_export.quantize(copied, "int8", threads=1, budget="cosine=0.9")
    variants = {part.name: [v.precision for v in part.variants] for part in again.manifest.parts}
    assert variants == {"vision": ["fp32", "int8"], "text": ["fp32", "int4", "int8"]}
    loss = again.manifest.part("text").variant("int8").loss
    assert loss is not None
    assert loss.budget["cosine"] == 0.9
    assert set(contents(copied)) == {*again.manifest.files, "vlm_export.json"}
    vlm_export.verify(copied).raise_if_failed()


def test_a_part_that_was_not_quantised_runs_in_float32(copied: Path, demo: Path) -> None:
    vlm_export.quantize(copied, "int4", parts=["text"], threads=1)
    image = np.full((64, 64, 3), 90, np.uint8)
    model, float32 = vlm_export.load(copied, precision="int4"), vlm_export.load(demo)
    assert np.array_equal(model.encode_image(image), float32.encode_image(image))
    assert not np.array_equal(model.encode_text("a red circle"), float32.encode_text("a red circle"))
    vlm_export.verify(copied, precision="int4").raise_if_failed()


def planted(
    bundle: Path,
    graph: str,
    change: Callable[[onnx.ModelProto], None],
    relist: Callable[[Path], None],
    **untold: dict[str, Any],
) -> None:
    """Changes a graph and makes the ledger and the manifest agree with it, as who knows the format would.

    Args:
        untold: what the ledger says of some initializers from now on.
    """
    path = bundle / graph
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    opened = open_bundle(bundle)
    ledger = read_ledger(opened)
    assert ledger is not None
    found = found_ledger(bundle, graph)
    told = {entry.name: entry for entry in ledger[graph].initializers}
    entries = []
    for entry in found.initializers:
        before = told[entry.name].to_json()
        says = {**before, "sha256": entry.sha256, **untold.get(entry.name, {})}
        entries.append(type(entry).from_json(says, "planted"))
    ledger[graph] = type(found)(graph, found.sha256, tuple(entries))
    (bundle / "ledger.json").write_bytes(ledger_to_bytes(list(ledger.values())))
    relist(bundle)


def changed(name: str, move: Callable[[Array], Array]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name.endswith(name)]
        array = np.frombuffer(tensor.raw_data, np.uint8).copy()
        tensor.raw_data = move(array).tobytes()

    return change


def first_byte(array: Array) -> Array:
    array[0] ^= 0x37
    return array


@pytest.mark.parametrize(
    ("precision", "tensor"),
    [
        ("int8", "blocks.0.mlp.fc1.weight.transposed_quantized"),
        ("int8", "token_embedding.weight.rows_quantized"),
        ("int8-static", "blocks.0.mlp.fc1.weight.transposed_quantized"),
        ("w8a16", "blocks.0.mlp.fc1.weight.transposed_Q8"),
        ("int4", "blocks.0.mlp.fc1.weight.transposed_Q4"),
        ("int4", "token_embedding.weight.rows_Q4"),
        ("int4", "token_embedding.weight.rows_zero_points"),
    ],
)
def test_one_changed_weight_is_found_also_where_every_digest_agrees(
    quantised: Callable[[str], Path], relist: Callable[[Path], None], tmp_path: Path, precision: str, tensor: str
) -> None:
    bundle = Path(shutil.copytree(quantised(precision), tmp_path / "bundle"))
    graph = open_bundle(bundle).manifest.part("text").variant(precision).file
    planted(bundle, graph, changed(tensor, first_byte), relist)
    with pytest.raises(VerificationError, match="not those of its float32 graph") as caught:
        vlm_export.verify(bundle)
    assert "steps away" in caught.value.got


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        ("norm.weight", "norm.weight is not the float32 graph's"),
        ("blocks.0.mlp.fc1.weight.transposed_quantized", "transposed_quantized is no weight of the float32 graph"),
    ],
)
def test_a_changed_weight_that_the_ledger_calls_none_is_found(
    quantised: Callable[[str], Path], relist: Callable[[Path], None], tmp_path: Path, tensor: str, told: str
) -> None:
    bundle = Path(shutil.copytree(quantised("int8"), tmp_path / "bundle"))
    none: dict[str, Any] = {"parameters": [], "checkpoint": [], "quantised": None}
    planted(bundle, "onnx/text_model_int8.onnx", changed(tensor, first_byte), relist, **{tensor: none})
    with pytest.raises(VerificationError, match="not those of its float32 graph") as caught:
        vlm_export.verify(bundle)
    assert told in caught.value.got


NORM, FIRST = "blocks.0.norm2.weight", "blocks.0.mlp.fc1.weight.transposed"


def times(name: str, row: int, factor: float) -> Callable[[onnx.ModelProto], None]:
    """Multiplies a channel of a norm, or a row of a matrix."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name == name]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[row] *= np.float32(factor)
        tensor.raw_data = array.tobytes()

    return change


@pytest.fixture(scope="session")
def smoothed(
    demo: Path,
    shared_bundle: Callable[..., Path],
    relist: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The demo with an outlier that its float32 graph makes up for, and an int8-static variant of the text part."""

    def make(target: Path) -> None:
        source = Path(shutil.copytree(demo, tmp_path_factory.mktemp("outlier") / "bundle"))
        for name, factor in ((NORM, 64), (NORM.replace("weight", "bias"), 64), (FIRST, 1 / 64)):
            planted(source, "onnx/text_model.onnx", times(name, 5, factor), relist)
        vlm_export.quantize(source, "int8-static", parts=["text"], output=target, threads=1)

    return shared_bundle("clip-demo-smoothed", make)


def test_outliers_are_smoothed_and_weights_still_prove_themselves(
    smoothed: Path, quantised: Callable[[str], Path]
) -> None:
    vlm_export.verify(smoothed, precision="int8-static").raise_if_failed()
    bundle = open_bundle(smoothed)
    ledger = read_ledger(bundle)
    assert ledger is not None
    entries = ledger["onnx/text_model_quantized.onnx"].initializers
    told = {entry.name: entry.smoothed_by for entry in entries if entry.smoothed_by is not None}
    assert told == {NORM: NORM, NORM.replace("weight", "bias"): NORM, f"{FIRST}_quantized": NORM}
    (loss,) = dict(losses(bundle)).values()
    plain = dict(losses(open_bundle(quantised("int8-static"))))["text"]
    assert loss.measured.outputs["text_embeds"].mean_cosine == pytest.approx(
        plain.measured.outputs["text_embeds"].mean_cosine, abs=5e-4
    )


@pytest.mark.parametrize(
    ("name", "factor", "told"),
    [
        (NORM, 1.5, "something else than powers of two"),
        (NORM, 2.0, "steps away"),
        (NORM.replace("weight", "bias"), 2.0, "norm2.bias is not the float32 graph's"),
        ("blocks.0.norm1.weight", 2.0, "norm1.weight is not the float32 graph's"),
    ],
)
def test_a_changed_norm_is_found_where_norms_are_smoothed(
    smoothed: Path, relist: Callable[[Path], None], tmp_path: Path, name: str, factor: float, told: str
) -> None:
    bundle = Path(shutil.copytree(smoothed, tmp_path / "bundle"))
    planted(bundle, "onnx/text_model_quantized.onnx", times(name, 7, factor), relist)
    with pytest.raises(VerificationError, match="not those of its float32 graph") as caught:
        vlm_export.verify(bundle, precision="int8-static")
    assert told in caught.value.got


def test_a_weight_that_stays_the_other_way_round_proves_itself(
    blip_bundle: Callable[[str], Path], relist: Callable[[Path], None], tmp_path: Path
) -> None:
    """The last product of BLIP's matching is a Gemm, which becomes a product of the transposed weight."""
    bundle = tmp_path / "bundle"
    vlm_export.quantize(blip_bundle("retrieval"), "int8", parts=["multimodal_text"], output=bundle, threads=1)
    ledger = read_ledger(open_bundle(bundle))
    assert ledger is not None
    graph, name = "onnx/multimodal_text_int8.onnx", "matching.weight.transposed"
    (entry,) = (one for one in ledger[graph].initializers if one.name == name)
    assert entry.parameters
    assert entry.transformation.endswith("transposed")
    planted(bundle, graph, times(name, 3, 1.001), relist)
    with pytest.raises(VerificationError, match="not those of its float32 graph") as caught:
        vlm_export.verify(bundle, precision="int8")
    assert f"{name} is not the float32 graph's" in caught.value.got


def test_a_changed_weight_is_found_by_its_digest(
    quantised: Callable[[str], Path], relist: Callable[[Path], None], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(quantised("int8"), tmp_path / "bundle"))
    path = bundle / "onnx" / "text_model_int8.onnx"
    model = onnx.load(path)
    changed("blocks.0.mlp.fc1.weight.transposed_quantized", first_byte)(model)
    onnx.save(model, path)
    with pytest.raises(InputError, match="not the one that was exported"):
        vlm_export.verify(bundle)
    relist(bundle)
    with pytest.raises(VerificationError, match="not the one that was exported"):
        vlm_export.verify(bundle)


def test_a_variant_without_its_loss_is_refused(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(quantised("int8"), tmp_path / "bundle"))
    path = bundle / "vlm_export.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for part in data["parts"]:
        for variant in part["variants"]:
            variant["loss"] = None
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match="no budget"):
        vlm_export.verify(bundle)


def test_the_users_images_and_texts_are_measured(demo: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((demo / "golden" / "contract").glob("margin-*.png")):
        shutil.copy(path, images)
    (tmp_path / "texts.txt").write_text("a red circle\n\ntwo squares\na red circle\n", encoding="utf-8")
    result = vlm_export.quantize(
        demo, "w8a16", images=[images], texts=tmp_path / "texts.txt", output=tmp_path / "out", threads=1
    )
    samples = result.losses[0].record.samples
    assert (samples.own_images, samples.own_texts) == (4, 2)


def test_no_sample_is_both_calibrated_on_and_measured(quantised: Callable[[str], Path]) -> None:
    bundle = open_bundle(quantised("int8-static"))
    every = sample_set(bundle, NamedSamples())
    calibrated, measured = every.part(0, 2), every.part(1, 2)
    assert not set(calibrated.texts) & set(measured.texts)
    assert not {id(image) for image in calibrated.images} & {id(image) for image in measured.images}
    for _, loss in losses(bundle):
        samples = loss.samples
        assert (samples.calibration_images, samples.calibration_texts) == (
            len(calibrated.images),
            len(calibrated.texts),
        )
        assert (samples.images, samples.texts) == (len(measured.images), len(measured.texts))
        assert any("calibrated on" in note for note in loss.notes)


def test_convolutions_of_a_resnet_become_static(shared_bundle: Callable[..., Path], tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "data" / "clip" / "rn_tiny" / "jit_archive.pt"
    options: dict[str, Any] = {
        "with_tokenizer": False,
        "exporter": "torchscript",
        "opset": 17,
        "parts": ("vision",),
        "threads": 1,
    }
    bundle = shared_bundle("rn-tiny-vision", lambda target: vlm_export.export(source, target, **options))
    result = vlm_export.quantize(bundle, "int8-static", output=tmp_path / "out", threads=1)
    (loss,) = result.losses
    assert loss.record.measured.size_share < 0.35
    graph = onnx.load(tmp_path / "out" / "onnx" / "vision_model_quantized.onnx").graph
    quantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    # The one that reads pixels stays.
    assert (
        sum(node.input[0] in quantised and node.input[1] in quantised for node in convolutions) == len(convolutions) - 1
    )
    vlm_export.verify(tmp_path / "out").raise_if_failed()


def test_a_convolution_behind_a_convolution_becomes_static(tmp_path: Path) -> None:
    """Depthwise and pointwise ones, with nothing between them, as in MobileNets and ConvNeXt."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((8, 3, 3, 3), (8, 1, 3, 3), (6, 8, 1, 1))]
    groups, names = (1, 8, 1), ("x", "a", "b", "y")
    nodes = [
        onnx.helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], name=f"conv{i}", group=groups[i])
        for i in range(3)
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 3, 8, 8]), ("y", [1, 6, 4, 4]))
    ]
    constants = [onnx.numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    graph = onnx.helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "float32.onnx")
    ranges = {"a": (-30.0, 30.0), "b": (-80.0, 80.0), "y": (-200.0, 200.0)}
    source = open_model(tmp_path / "float32.onnx")
    assert calibrated_tensors(source, RECIPES["int8-static"]) == ["a", "b", "y"]
    made = quantise(source, RECIPES["int8-static"], tmp_path / "levels.bin", calibration=Calibration(ranges))
    save_model(made.model, tmp_path / "static.onnx", storage=Storage())
    feeds = {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    expected, got = (OrtEngine(tmp_path / f"{name}.onnx", threads=1).run(feeds)["y"] for name in ("float32", "static"))
    assert 0.99 < row_cosines(expected, got).min() < 1
    operators = [node.op_type for node in made.model.graph]
    assert (operators.count("QuantizeLinear"), len(made.weights)) == (3, 2)


@pytest.mark.parametrize("precision", ["int8", "w8a16", "int4"])
def test_a_table_of_whole_numbers_stays(tmp_path: Path, precision: str) -> None:
    """MiniCPM-V 2.6 looks up the borders between positions for the number of rows of an image."""
    borders = np.outer(np.arange(65), np.arange(1, 33)).astype(np.float32)
    weights = np.random.default_rng(0).standard_normal((65, 32)).astype(np.float32)
    nodes = [onnx.helper.make_node("Gather", [f"{name}_table", "ids"], [name]) for name in ("borders", "rows")]
    ends = [
        onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"]),
        *(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 32]) for name in ("borders", "rows")),
    ]
    tables = [
        onnx.numpy_helper.from_array(table, f"{name}_table")
        for name, table in zip(("borders", "rows"), (borders, weights), strict=True)
    ]
    graph = onnx.helper.make_graph(nodes, "tables", ends[:1], ends[1:], tables)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "float32.onnx")
    made = quantise(open_model(tmp_path / "float32.onnx"), RECIPES[precision], tmp_path / "levels.bin")
    assert "whole numbers" in made.kept["borders_table"]
    assert [weight.weight for weight in made.weights.values()] == ["rows_table"]


def accuracy_levels(bundle: Path, part: str) -> set[int]:
    """Of the MatMulNBits of a part's int4 graph; 0 where none is stated."""
    graph = onnx.load(bundle / open_bundle(bundle).manifest.part(part).variant("int4").file).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert products
    return {sum(one.i for one in node.attribute if one.name == "accuracy_level") for node in products}


def test_four_bits_round_activations_where_tokens_come_one_by_one(
    blip_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """ONNX Runtime multiplies one row with blocks of 4 bits fast only in 8 bits; an encoder has many rows."""
    parts, loose = ["cross_key_values", "text_decoder"], "cosine=0.5,mean-cosine=0.5,exact-match=0"
    bundle = tmp_path / "out"
    vlm_export.quantize(blip_bundle("caption"), "int4", parts=parts, budget=loose, output=bundle, threads=1)
    assert [accuracy_levels(bundle, part) for part in parts] == [{0}, {4}]
    vlm_export.verify(bundle, precision="int4").raise_if_failed()


def test_what_cannot_be_is_told(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int9") as caught:
        vlm_export.quantize(demo, "int9", output=tmp_path / "out")
    assert "int8" in caught.value.fix
    with pytest.raises(UsageError, match="no option 'image'"):
        vlm_export.quantize(demo, "int8", image=3, output=tmp_path / "out")
    with pytest.raises(InputError, match="no part 'visio'"):
        vlm_export.quantize(demo, "int8", parts=["visio"], output=tmp_path / "out")
    (tmp_path / "texts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="texts cannot be read"):
        vlm_export.quantize(demo, "int8", texts=tmp_path / "texts", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
