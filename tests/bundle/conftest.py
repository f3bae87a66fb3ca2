from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest, PartRecord, SourceFile, SourceRecord, VariantRecord
from vlm_export.bundle.opened import open_bundle
from vlm_export.bundle.publish import Staging, publication
from vlm_export.bundle.safe_files import record_of_file, relative_files
from vlm_export.specs import TextSpec, torchvision_image_spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec

GRAPH = "onnx/vision_model.onnx"
DATA = "onnx/vision_model.onnx_data"


def make_manifest(data: bool = True) -> Manifest:
    """A pair of one part, without file records."""
    signature = Signature(
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 8)),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", 4)),),
        axes=(Axis("batch"),),
    )
    variant = VariantRecord("fp32", GRAPH, (DATA,) if data else (), warnings=("a warning",), verification={"ok": True})
    return Manifest(
        name="tiny",
        source=SourceRecord("tiny.pt", "state_dict", files=(SourceFile("tiny.pt", 3, "ab" * 32),)),
        family="clip",
        architecture={"embed_dim": 4, "vision": {"layers": [1, 2]}},
        image=torchvision_image_spec(8, "bicubic", "after_crop", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        text=TextSpec(16, 100, 99, 0, "openai"),
        tasks=(EmbedSpec(EncoderSpec("vision", "image_embeds"), None),),
        parts=(PartRecord("vision", signature, (variant,)),),
        tools={"torch": "2.15", "onnx": "1.23"},
    )


def make_graph(entries: dict[str, str] | None = None, dims: tuple[int, ...] = (8, 4), **fields: Any) -> bytes:
    """`image_embeds = pixel_values @ weight`; the weight is external with these entries, or inline without."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, (8, 4), np.ones(32, np.float32).tobytes(), raw=True)
    del weight.dims[:]
    weight.dims.extend(dims)
    if entries is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["pixel_values", "weight"], ["image_embeds"], **fields)],
        "tiny",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def reseal_bundle(root: Path, manifest: Manifest | None = None) -> None:
    """Writes a manifest that agrees with whatever lies in the directory, links left out, as an attacker would."""
    (root / MANIFEST_NAME).unlink(missing_ok=True)
    names = [name for name in relative_files(root) if (root / name).is_file()]
    manifest = manifest or make_manifest(data=(root / DATA).exists())
    files = {name: record_of_file(root, name) for name in names}
    (root / MANIFEST_NAME).write_bytes(replace(manifest, files=files).to_bytes())


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return make_manifest()


@pytest.fixture(scope="session")
def graph_bytes() -> Callable[..., bytes]:
    return make_graph


@pytest.fixture(scope="session")
def reseal() -> Callable[..., None]:
    return reseal_bundle


@pytest.fixture
def build_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Builds a bundle from a graph and its data file, with a manifest that agrees with both."""

    def build(graph: bytes | None = None, data: bytes | None = None, name: str = "bundle") -> Path:
        if graph is None:
            graph, data = make_graph({"location": "vision_model.onnx_data"}), np.ones(32, np.float32).tobytes()
        root = tmp_path / name
        (root / "onnx").mkdir(parents=True)
        (root / GRAPH).write_bytes(graph)
        if data is not None:
            (root / DATA).write_bytes(data)
        (root / "config.json").write_text("{}")
        reseal_bundle(root)
        return root

    return build


@pytest.fixture(scope="session")
def write_graph() -> Callable[[Staging], None]:
    """Writes what the manifest of `make_manifest` names."""

    def write(staging: Staging) -> None:
        staging.file(GRAPH).write_bytes(make_graph({"location": "vision_model.onnx_data"}))
        staging.file(DATA).write_bytes(bytes(128))

    return write


@pytest.fixture
def publish_generation(manifest: Manifest, graph_bytes: Callable[..., bytes]) -> Callable[..., Manifest]:
    """Publishes a bundle whose every file, and whose manifest, carry one number."""
    graph = graph_bytes({"location": "vision_model.onnx_data"})

    def run(target: Path, generation: int, overwrite: bool = True) -> Manifest:
        with publication(target, overwrite=overwrite) as staging:
            staging.file(GRAPH).write_bytes(graph)
            staging.file(DATA).write_bytes(bytes([generation]) * 128)
            staging.file("config.json").write_text(str(generation))
            staging.file("golden/vision/test_data_set_0/input_0.pb").write_bytes(bytes([generation]) * 70_000)
            return staging.commit(replace(manifest, architecture={"generation": generation}))

    return run


def read_bundle_generation(target: Path) -> int:
    """The number of a bundle, after checking that every file carries it and that no other file lies there."""
    bundle = open_bundle(target)
    bundle.verify(bundle.manifest.files)
    bundle.model_files(bundle.manifest.part("vision").variant("fp32"))
    generation = int(bundle.manifest.architecture["generation"])
    assert bundle.file("config.json").read_text() == str(generation)
    assert set(bundle.file(DATA).read_bytes()) == {generation}
    assert set(bundle.file("golden/vision/test_data_set_0/input_0.pb").read_bytes()) == {generation}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {*bundle.manifest.files, MANIFEST_NAME}
    return generation


@pytest.fixture(scope="session")
def read_generation() -> Callable[[Path], int]:
    return read_bundle_generation
