"""`package`: what each consumer loads, fed as its own code feeds it, gives the vectors of the bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tokenizers import Tokenizer

import vlm_export
from vlm_export.bundle.layout import TRANSFORMERS_JS_DTYPES
from vlm_export.cli.main import main
from vlm_export.cli.package import NAMES
from vlm_export.errors import InputError, UsageError, VerificationError
from vlm_export.layouts.package import CONSUMERS, package
from vlm_export.runtime.inputs.images import open_image, preprocess_image

Packaged = Callable[[str], Path]
IMAGES = sorted((Path(__file__).parents[2] / "configs" / "demo" / "images").glob("*.png"))[:2]
TEXTS = ["red circle", "a photo of a blue square", "pink ring"]


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ids_of(model: Any, texts: list[str]) -> np.ndarray:
    tokenizer = model.session.tokenizer
    return np.asarray(tokenizer.pad_masked(tokenizer.encode_rows(texts, truncate=True))[0])


@pytest.fixture(scope="module")
def model(demo: Path) -> Any:
    return vlm_export.load(demo, threads=1)


@pytest.fixture(scope="module")
def pixels(model: Any) -> np.ndarray:
    spec = model.manifest.image
    return np.stack([preprocess_image(open_image(path), spec) for path in IMAGES])


def assert_rows(got: np.ndarray, expected: np.ndarray, *, of_unit_length: bool) -> None:
    lengths = np.linalg.norm(got, axis=1, keepdims=True)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got / lengths, expected, atol=2e-6)
    assert (np.abs(lengths - 1) < 1e-5).all() == of_unit_length


@pytest.mark.parametrize("consumer", [name for name in CONSUMERS if name != "typesense"])
def test_a_package_proves_itself(packaged: Packaged, consumer: str) -> None:
    result = vlm_export.verify(packaged(consumer), threads=1)
    result.raise_if_failed()
    assert {report.part for report in result.reports} == {
        part.name for part in vlm_export.load(packaged(consumer)).manifest.parts
    }


@pytest.mark.parametrize("consumer", ["transformers.js", "optimum"])
def test_both_encoders_in_one_graph(packaged: Packaged, consumer: str, model: Any, pixels: np.ndarray) -> None:
    """Two images and three texts, as transformers' CLIPModel answers."""
    run = session(packaged(consumer) / "onnx" / "model.onnx")
    ids = ids_of(model, TEXTS)
    names = [output.name for output in run.get_outputs()]
    assert names == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    found = dict(zip(names, run.run(None, {"input_ids": ids, "pixel_values": pixels}), strict=True))
    images, texts = model.encode_image(IMAGES), model.encode_text(TEXTS)
    assert_rows(found["image_embeds"], images, of_unit_length=True)
    assert_rows(found["text_embeds"], texts, of_unit_length=True)
    scores = found["logits_per_image"]
    np.testing.assert_allclose(scores, found["logits_per_text"].T)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, model.classify(IMAGES, TEXTS, template="{}"), atol=1e-4)
    # The towers, and our own loader, read it as they read the bundle.
    np.testing.assert_array_equal(vlm_export.load(packaged(consumer), threads=1).encode_text(TEXTS), texts)
    config = json.loads((packaged(consumer) / "config.json").read_text(encoding="utf-8"))
    # Without it browsers ask for 8-bit graphs.
    assert config["transformers.js_config"]["dtype"] == "fp32"


def test_immich(packaged: Packaged, model: Any, pixels: np.ndarray) -> None:
    """`clip/textual.py` and `clip/visual.py` of immich_ml: one text, one image, row 0 of output 0 as it is."""
    folder = packaged("immich")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "textual" / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    pad, length = settings["pad_token"], config["text_cfg"]["context_length"]
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    textual, visual = (session(folder / part / "model.onnx") for part in ("textual", "visual"))
    rows = [textual.run(None, {"text": np.array([tokenizer.encode(text).ids], np.int32)})[0][0] for text in TEXTS]
    assert_rows(np.array(rows), model.encode_text(TEXTS), of_unit_length=True)
    rows = [visual.run(None, {"image": image[None]})[0][0] for image in pixels]
    assert_rows(np.array(rows), model.encode_image(IMAGES), of_unit_length=True)
    stated = json.loads((folder / "visual" / "preprocess_cfg.json").read_text(encoding="utf-8"))
    spec = model.manifest.image
    assert (stated["size"], stated["interpolation"]) == ([spec.size_pixels] * 2, spec.resample)
    assert (stated["mean"], stated["std"], stated["resize_mode"]) == (list(spec.mean), list(spec.std), "shortest")


def test_immich_of_bytes(packaged: Packaged, model: Any, pixels: np.ndarray) -> None:
    """`clip/visual.py` of newer releases gives the resized and cropped image itself, (1, S, S, 3)."""
    spec = model.manifest.image
    rgb = np.rint((pixels.transpose(0, 2, 3, 1) * spec.std + spec.mean) * 255).astype(np.uint8)
    visual = session(packaged("immich-uint8") / "visual" / "model.onnx")
    rows = [visual.run(None, {"image": image[None]})[0][0] for image in rgb]
    assert_rows(np.array(rows), model.encode_image(IMAGES), of_unit_length=True)


def test_modern_onnx_clip(packaged: Packaged, model: Any, pixels: np.ndarray) -> None:
    """Its `OnnxClip`: first input, first output, ids int64 that are filled with 0 to the config's length."""
    folder = packaged("modern-onnx-clip")
    length = json.loads((folder / "config.json").read_text(encoding="utf-8"))["context_length"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [entry.ids[:length] for entry in tokenizer.encode_batch(TEXTS)]
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)
    for name, feed, expected in (
        ("textual", ids, model.encode_text(TEXTS)),
        ("visual", pixels, model.encode_image(IMAGES)),
    ):
        run = session(folder / f"{name}.onnx")
        assert len(run.get_inputs()) == len(run.get_outputs()) == 1
        assert_rows(run.run(None, {run.get_inputs()[0].name: feed})[0], expected, of_unit_length=False)


def test_clip_as_service(packaged: Packaged, model: Any) -> None:
    """Both inputs of the text encoder are int32 and declared."""
    ids = ids_of(model, TEXTS).astype(np.int32)
    run = session(packaged("clip-as-service") / "textual.onnx")
    assert {entry.name: entry.type for entry in run.get_inputs()} == {
        "input_ids": "tensor(int32)",
        "attention_mask": "tensor(int32)",
    }
    found = run.run(None, {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32)})
    assert_rows(found[0], model.encode_text(TEXTS), of_unit_length=False)


def test_fastembed(packaged: Packaged, model: Any, pixels: np.ndarray) -> None:
    """A folder for each encoder with what its loaders open beside the graph."""
    folder = packaged("fastembed")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.onnx"):
        assert (folder / "text" / name).is_file()
    assert (folder / "image" / "preprocessor_config.json").is_file()
    run = session(folder / "image" / "model.onnx")
    assert_rows(run.run(None, {"pixel_values": pixels})[0], model.encode_image(IMAGES), of_unit_length=False)


def test_a_variant_is_packaged(demo: Path, tmp_path: Path, model: Any, pixels: np.ndarray) -> None:
    made = package(demo, tmp_path / "half", "transformers.js", precision="fp16", threads=1)
    (graph,) = [part for part in made.manifest.parts if part.name == "model"]
    assert [variant.file for variant in graph.variants] == ["onnx/model_fp16.onnx"]
    feeds = {"input_ids": ids_of(model, TEXTS), "pixel_values": pixels}
    found = session(tmp_path / "half" / "onnx" / "model_fp16.onnx").run(["image_embeds"], feeds)[0]
    assert (np.sum(found * model.encode_image(IMAGES), axis=1) > 0.9999).all()


def test_precisions_have_the_consumers_dtypes(demo: Path, tmp_path: Path) -> None:
    assert TRANSFORMERS_JS_DTYPES["int4"] == "q4"
    vlm_export.quantize(demo, "int8-static", output=tmp_path / "static", threads=1)
    package(tmp_path / "static", tmp_path / "packed", "transformers.js", precision="int8-static", threads=1)
    config = json.loads((tmp_path / "packed" / "config.json").read_text(encoding="utf-8"))
    # Browsers ask for 8-bit graphs, and all are there.
    assert "dtype" not in config.get("transformers.js_config", {})
    assert (tmp_path / "packed" / "onnx" / "model_quantized.onnx").is_file()
    # The towers are 8-bit, and the combined graph is not: the dtype must be told.
    package(tmp_path / "static", tmp_path / "float32", "transformers.js", precision="fp32", threads=1)
    config = json.loads((tmp_path / "float32" / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"]["dtype"] == "fp32"
    with pytest.raises(InputError, match=r"transformers\.js cannot use this bundle") as error:
        package(demo, tmp_path / "out", "transformers.js", precision="w8a16")
    assert "fp32, fp16, int8, int8-static, int4" in error.value.expected


def test_operators_of_older_opsets(tmp_path: Path, model: Any, pixels: np.ndarray) -> None:
    """Axes of reductions are attributes before opset 18."""
    options: dict[str, Any] = {"exporter": "torchscript", "opset": 16, "threads": 1, "parts": ("vision", "text")}
    vlm_export.export("clip-demo", tmp_path / "old", **options)
    package(tmp_path / "old", tmp_path / "immich", "immich", threads=1)
    found = session(tmp_path / "immich" / "visual" / "model.onnx").run(None, {"image": pixels})[0]
    assert_rows(found, model.encode_image(IMAGES), of_unit_length=True)


def test_what_a_consumer_cannot_use_is_refused(demo: Path, tmp_path: Path, packaged: Packaged) -> None:
    with pytest.raises(InputError, match="typesense cannot use this bundle") as error:
        package(demo, tmp_path / "out", "typesense")
    assert (error.value.expected, error.value.got) == ("images of 224 pixels, which its code states", "64 pixels")
    with pytest.raises(UsageError, match="no layout for 'immitch'") as usage:
        package(demo, tmp_path / "out", "immitch")
    assert "immich" in usage.value.fix
    with pytest.raises(UsageError, match="variant 'int3'"):
        package(demo, tmp_path / "out", "immich", precision="int3")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not a bundle"):
        package(demo, tmp_path / "out", "immich", overwrite=True)
    # A package without tasks says so, and cannot be packaged again.
    other = vlm_export.load(packaged("immich"))
    with pytest.raises(InputError, match="cannot embed"):
        other.encode_text(TEXTS)
    with pytest.raises(InputError, match="cannot use this bundle"):
        package(packaged("immich"), tmp_path / "again", "triton")


def test_a_changed_package_fails(packaged: Packaged, tmp_path: Path, relist: Callable[[Path], None]) -> None:
    copy = Path(shutil.copytree(packaged("immich"), tmp_path / "copy"))
    graph = onnx.load(copy / "visual" / "model.onnx")
    weight = next(entry for entry in graph.graph.initializer if len(entry.dims) == 2)
    values = np.array(onnx.numpy_helper.to_array(weight))
    values[3] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, copy / "visual" / "model.onnx")
    with pytest.raises(InputError, match="not the one"):
        vlm_export.verify(copy, threads=1).raise_if_failed()
    relist(copy)
    with pytest.raises(VerificationError):
        vlm_export.verify(copy, threads=1).raise_if_failed()


def test_the_command(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(CONSUMERS) == NAMES
    arguments = ["package", str(demo), "--for", "immich", "-o", str(tmp_path / "out"), "--threads", "1"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "visual/model.onnx" in said
    assert "packaged for immich" in said
    assert main(arguments) == UsageError.exit_status
    assert main([*arguments, "--overwrite", "--json"]) == 0
    stated = json.loads(capsys.readouterr().out)
    assert stated["manifest"]["export"]["packaged_for"] == "immich"
    assert [report["passed"] for report in stated["verification"]] == [True, True]


def test_a_package_never_replaces_its_bundle(demo: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo, bundle)
    (tmp_path / "link").symlink_to(bundle)
    for target in (bundle, tmp_path / "link", bundle / "inside"):
        with pytest.raises(UsageError, match="would lie in the bundle"):
            package(bundle, target, "immich", overwrite=True, threads=1)
    assert vlm_export.load(bundle).tasks.keys() == {"embed"}
