"""`--image-size`, `--dynamic-image-size` and `--with-preprocessing`, in graphs of both back ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import UsageError
from vlm_export.exporting.backends import Exporter, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.exporting.parts import add_preprocessing
from vlm_export.family import BuildOptions, Model, Part
from vlm_export.models.clip.family import ClipFamily
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.specs import ImageSpec

DATA = Path(__file__).parents[1] / "data" / "clip"
UNTRACED = [(14, 14), (42, 42), (70, 42), (14, 98), (112, 126), (196, 28)]


def build(path: Path, tmp_path: Path, options: BuildOptions) -> Model:
    checkpoint = open_checkpoint(str(path))
    with ScratchStore(tmp_path / "weights.bin") as store:
        return ClipFamily().build(checkpoint, store, options)


def engine_for(part: Part, opset: int, exporter: Exporter, path: Path) -> OrtEngine:
    graph = finish_graph(simplify_graph(export_part(part, opset, exporter)), part.signature)
    write_graph(graph, path)
    return OrtEngine(path)


@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 18), ("torchscript", 14)])
def test_dynamic_size_equals_the_eager_model_at_sizes_never_traced(
    exporter: Exporter, opset: int, tmp_path: Path
) -> None:
    model = build(DATA / "vit_p14" / "state_dict_fp32.pt", tmp_path, BuildOptions(dynamic_image_size=True))
    part = model.parts[0]
    assert part.signature.inputs[0].shape == ("batch", 3, "height", "width")
    engine = engine_for(part, opset, exporter, tmp_path / "graph.onnx")
    for height, width in UNTRACED:
        inputs = part.examples({"batch": 2, "height": height, "width": width}, 0)
        with torch.inference_mode():
            expected = part.module(torch.from_numpy(inputs["pixel_values"])).numpy()
        np.testing.assert_allclose(engine.run(inputs)["image_embeds"], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 18), ("torchscript", 14)])
def test_full_size_vit_at_six_sizes_never_traced(exporter: Exporter, opset: int, tmp_path: Path) -> None:
    known = load_known("clip-vit-b-16")
    published = ClipFamily().published_tensors(known.architecture)
    checkpoint = random_checkpoint(known.name, published, 0, tmp_path / "random.safetensors", None)
    with ScratchStore(tmp_path / "weights.bin") as store:
        part = ClipFamily().build(checkpoint, store, BuildOptions(dynamic_image_size=True)).parts[0]
        engine = engine_for(part, opset, exporter, tmp_path / "graph.onnx")
        for height, width in [(16, 16), (224, 224), (240, 336), (448, 160), (384, 384), (80, 560)]:
            inputs = part.examples({"batch": 1, "height": height, "width": width}, 0)
            with torch.inference_mode():
                expected = part.module(torch.from_numpy(inputs["pixel_values"])).numpy()
            error = np.abs(engine.run(inputs)["image_embeds"] - expected).max() / np.abs(expected).max()
            print(f"{exporter} {height}×{width}: {error:.1e} of the largest value")
            assert error <= 1e-4


def test_another_fixed_size_equals_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 98},
        projection_dim=16,
    )
    reference = CLIPModel(config).eval()
    reference.save_pretrained(tmp_path / "hub")
    model = build(tmp_path / "hub", tmp_path, BuildOptions(image_size=56))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        features = reference.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
        expected = features if isinstance(features, torch.Tensor) else features.pooler_output
        np.testing.assert_allclose(model.parts[0].module(pixels).numpy(), expected.numpy(), atol=1e-5)
    assert isinstance(model.image, ImageSpec)
    assert model.image.size_pixels == 56
    assert model.references["vision"]()({"pixel_values": pixels.numpy()})["image_embeds"].shape == (2, 16)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of the patch size"):
        build(DATA / "vit_p14" / "state_dict_fp32.pt", tmp_path, BuildOptions(image_size=50))
    with pytest.raises(UsageError, match="only a ViT"):
        build(DATA / "rn_tiny" / "jit_archive.pt", tmp_path, BuildOptions(dynamic_image_size=True))


@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 18), ("torchscript", 11)])
def test_uint8_images_of_any_size_give_the_host_paths_embeddings(
    exporter: Exporter, opset: int, tmp_path: Path
) -> None:
    model = add_preprocessing(build(DATA / "vit_w128" / "jit_archive.pt", tmp_path, BuildOptions()))
    part = model.parts[-1]
    engine = engine_for(part, opset, exporter, tmp_path / "graph.onnx")
    reference = model.references[part.name]()
    image = Image.open(DATA / "vit_w128" / "image.png").convert("RGB")
    for size in [(61, 47), (400, 300), (90, 200)]:
        pixels = np.asarray(image.resize(size))[None]
        found, expected = engine.run({"pixels": pixels})["image_embeds"], reference({"pixels": pixels})["image_embeds"]
        cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
        assert cosine >= 0.9999
