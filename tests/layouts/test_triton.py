"""Triton's model repository: each configuration is its graph's, and the ensemble's steps give the bundle's vectors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import vlm_export
from vlm_export.layouts.package import package

TYPES = {
    "TYPE_FP32": onnx.TensorProto.FLOAT,
    "TYPE_INT64": onnx.TensorProto.INT64,
    "TYPE_UINT8": onnx.TensorProto.UINT8,
}
IMAGES = sorted((Path(__file__).parents[2] / "configs" / "demo" / "images").glob("*.png"))[:2]


@pytest.fixture(scope="module")
def repository(demo_from_uint8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "out"
    package(demo_from_uint8, target, "triton", threads=1)
    vlm_export.verify(target, threads=1).raise_if_failed()
    return target / "models"


def stated(folder: Path) -> list[tuple[str, str, list[int]]]:
    """Name, type and dims of every input and output of a configuration."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    assert text.startswith(f'name: "{folder.name}"\n')
    found = re.findall(r'name: "(\w+)", data_type: (\w+), dims: \[ (.*?) \]', text)
    return [(name, kind, [int(size) for size in dims.split(", ")]) for name, kind, dims in found]


def sizes_of(folder: Path) -> list[tuple[str, int, list[int]]]:
    graph = onnx.load(folder / "1" / "model.onnx").graph
    kinds = [(value.name, value.type.tensor_type) for value in (*graph.input, *graph.output)]
    return [(name, kind.elem_type, [dim.dim_value or -1 for dim in kind.shape.dim]) for name, kind in kinds]


@pytest.mark.parametrize(("name", "batched"), [("vision", True), ("text", True), ("pixels_from_uint8", False)])
def test_a_configuration_is_its_graphs(repository: Path, name: str, batched: bool) -> None:
    """With batches, `dims` leave out the first axis, which is the batch."""
    text = (repository / name / "config.pbtxt").read_text(encoding="utf-8")
    assert f'backend: "onnxruntime"\nmax_batch_size: {64 if batched else 0}\n' in text
    assert ("dynamic_batching {" in text) == batched
    expected = sizes_of(repository / name)
    assert all(sizes[0] == -1 for _, _, sizes in expected)
    found = [(name, TYPES[kind], ([-1] if batched else []) + dims) for name, kind, dims in stated(repository / name)]
    assert found == expected


def test_without_preprocessing_there_is_no_ensemble(packaged: Callable[[str], Path]) -> None:
    assert sorted(path.name for path in (packaged("triton") / "models").iterdir()) == ["text", "vision"]


def test_the_ensembles_steps_give_the_vectors(repository: Path, demo_from_uint8: Path) -> None:
    """Two images of different sizes, each prepared alone, their pixels in one batch; as its scheduler would."""
    assert sorted(path.name for path in repository.iterdir()) == [
        "pixels_from_uint8",
        "text",
        "vision",
        "vision_from_uint8",
    ]
    folder = repository / "vision_from_uint8"
    assert list((folder / "1").iterdir())  # Triton wants a folder for the version, and a copy may drop an empty one
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    assert 'platform: "ensemble"\nmax_batch_size: 0\n' in text
    steps = re.findall(r'model_name: "(\w+)".*?input_map {(.*?)}.*?output_map {(.*?)}', text, re.DOTALL)
    wide = np.asarray(Image.open(IMAGES[1]).convert("RGB").resize((150, 110)))
    images = [np.asarray(Image.open(IMAGES[0]).convert("RGB")), wide]
    rows = [{"pixels": image[None]} for image in images]
    for name, taken, made in steps:
        session = onnxruntime.InferenceSession(repository / name / "1" / "model.onnx")
        (key, source), (output, target) = (re.findall(r'"(\w+)"', entry) for entry in (taken, made))
        if name == "vision":
            rows = [{"batch": np.concatenate([row[source] for row in rows])}]
            source = "batch"
        rows = [{target: session.run([output], {key: row[source]})[0]} for row in rows]
    (result,) = rows
    assert [name for name, _, _ in stated(folder)] == ["pixels", *result]
    (vectors,) = result.values()
    model = vlm_export.load(demo_from_uint8, threads=1)
    expected = model.encode_image([Image.fromarray(image) for image in images])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert ((vectors * expected).sum(axis=1) > 0.9999).all()
