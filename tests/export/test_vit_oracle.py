"""timm's vision transformers with resampled positions, in graphs of both back ends, against the originals' records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.export.backends import Exporter, Lowerings, export_part
from vlm_export.export.simplify import finish_graph, simplify_graph
from vlm_export.export.writer import write_graph
from vlm_export.family import Checkpoint, Part
from vlm_export.models.vit import VisionTransformer, VitForm
from vlm_export.models.vit_weights import eva_table, vit_table
from vlm_export.models.weights import Target, load_weights, prefixed
from vlm_export.runtime.engine import OrtEngine
from vlm_export.signature import Axis, Signature, TensorSpec

DATA = Path(__file__).parents[1] / "data" / "minicpmv"
PATCH = 14
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """An encoder of the oracle: its form, its keys, and the names of its recorded outputs."""

    folder: str
    form: VitForm
    keys: str
    table: Mapping[str, Target]
    output: str


VARIANTS = (
    Variant(
        "v1_0",
        VitForm(72, 2, 1, 269, PATCH, 6, has_class_token=False, antialias=True),
        "vpm.",
        vit_table(2, has_class_token=False),
        "vpm_",
    ),
    Variant(
        "v2_0",
        VitForm(144, 1, 2, 538, PATCH, 6, has_class_token=False, antialias=True),
        "vpm.",
        vit_table(1, has_class_token=False),
        "vpm_",
    ),
    Variant(
        "omnilmm",
        VitForm(64, 2, 2, 256, PATCH, 6, post_norm=True, antialias=True),
        "model.vision_tower.",
        eva_table(2),
        "vision_tower_",
    ),
)


def load_encoder(variant: Variant, folder: Path) -> VisionTransformer:
    names = ["model.safetensors", "pytorch_model.bin"]
    (path,) = (DATA / variant.folder / name for name in names if (DATA / variant.folder / name).exists())
    whole = open_checkpoint(str(path))
    tensors = {key: info for key, info in whole.tensors.items() if key.startswith(variant.keys)}
    checkpoint = Checkpoint(whole.source, whole.format, whole.files, tensors, whole.read)
    with torch.device("meta"):
        encoder = VisionTransformer(variant.form)
    with ScratchStore(folder / "weights.bin") as store:
        load_weights(encoder, checkpoint, prefixed(variant.table, variant.keys, ""), store)
        return encoder


def padded(pixels: Array) -> Array:
    """Zeros below and to the right, up to whole patches: timm's `dynamic_img_pad`."""
    height, width = pixels.shape[2:]
    return np.pad(pixels, ((0, 0), (0, 0), (0, -height % PATCH), (0, -width % PATCH)))


def records(variant: Variant) -> dict[str, tuple[Array, Array]]:
    """Size → pixels and recorded tokens."""
    golden = load_file(DATA / variant.folder / "golden.safetensors")
    prefix = "input.pixel_"
    sizes = [name.removeprefix(prefix) for name in golden if name.startswith(prefix)]
    return {size: (padded(golden[prefix + size]), golden[f"output.{variant.output}{size}"]) for size in sizes}


def dynamic_part(encoder: VisionTransformer) -> Part:
    encoder.dynamic_image_size = True
    axes = (Axis("batch"), Axis("height", PATCH, 64 * PATCH, PATCH), Axis("width", PATCH, 64 * PATCH, PATCH))
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, "height", "width"))
    tokens = TensorSpec("tokens", "float32", ("batch", "tokens", encoder.form.width))
    signature = Signature((pixels,), (tokens,), (*axes, Axis("tokens")))
    shape = (2, 3, 7 * PATCH, 9 * PATCH)
    return Part("vision", encoder, signature, lambda sizes, seed: {"pixel_values": np.zeros(shape, np.float32)})


def assert_equal(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.folder)
@pytest.mark.parametrize(
    ("exporter", "opset", "form"),
    [("torchscript", 11, "matmul"), ("torchscript", 18, "resize-op"), ("dynamo", 18, "matmul")],
)
def test_every_recorded_size(variant: Variant, exporter: Exporter, opset: int, form: str, tmp_path: Path) -> None:
    encoder = load_encoder(variant, tmp_path)
    part = dynamic_part(encoder)
    lowerings = Lowerings(interpolation="resize-op" if form == "resize-op" else "matmul")
    graph = finish_graph(simplify_graph(export_part(part, opset, exporter, lowerings)), part.signature)
    write_graph(graph, tmp_path / "graph.onnx")
    engine = OrtEngine(tmp_path / "graph.onnx", threads=1)
    sizes = records(variant)
    assert len(sizes) >= 2
    for pixels, expected in sizes.values():
        with torch.inference_mode():
            assert_equal(encoder(torch.from_numpy(pixels)).numpy(), expected)
        assert_equal(engine.run({"pixel_values": pixels})["tokens"], expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.folder)
def test_without_antialiasing_the_records_are_missed(variant: Variant, tmp_path: Path) -> None:
    """Negative control: the same encoder, the other filter."""
    encoder = load_encoder(variant, tmp_path)
    wrong = VisionTransformer(replace(variant.form, antialias=False))
    wrong.load_state_dict(encoder.state_dict())
    wrong.dynamic_image_size = True
    resized = [pair for size, pair in records(variant).items() if not size.startswith("84")]
    for pixels, expected in resized:
        with torch.inference_mode():
            assert np.abs(wrong(torch.from_numpy(pixels)).numpy() - expected).max() > 0.01
