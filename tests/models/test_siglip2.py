"""SigLIP 2's NaFlex as transformers saves it: images of any shape in one batch, each with positions of its own."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    Siglip2VisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.exporting.backends import example_tensors
from vlm_export.family import Part
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.layers.positions import positions_of_grids
from vlm_export.models.registry import load_family
from vlm_export.models.siglip.family import Siglip2Family
from vlm_export.models.siglip.naflex import NaflexExamples
from vlm_export.runtime.inputs.patches import patch_shape
from vlm_export.specs import PatchSpec

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCH, PATCHES, LENGTH = 8, 36, 64
# Width and height: six grids of patches that share a batch.
SHAPES = ((64, 48), (48, 64), (200, 20), (30, 170), (8, 8), (150, 40))


def tokenizer() -> Any:
    letters = sorted({letter for text in duals.TEXTS for letter in text.lower().replace(" ", "▁")} - set("շքz龟მ🎂½"))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += ["▁c", "at", "▁cat"]
    return Siglip2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=[("▁", "c"), ("a", "t"), ("▁c", "at")],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
        model_max_length=LENGTH,
    )


def config_of(rows: int) -> Any:
    text: dict[str, Any] = {**SIZES, "vocab_size": rows, "max_position_embeddings": LENGTH, "projection_size": 64}
    text |= {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    return Siglip2Config(text_config=text, vision_config={**SIZES, "num_patches": 16, "patch_size": PATCH})


def image_processor(**settings: Any) -> Any:
    return Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=PATCHES, do_convert_rgb=True, **settings)


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, texts = tmp_path_factory.mktemp("naflex"), tokenizer()
    torch.manual_seed(0)
    model = duals.spread(Siglip2Model(config_of(len(texts))))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.5)
    model.save_pretrained(folder)
    Siglip2Processor(image_processor(), texts).save_pretrained(folder)
    return folder, model


def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((320, 320), Image.Resampling.BICUBIC)
    return [large.resize(size) for size in SHAPES]


def assert_images_equal(source: Path, bundle: Any, encode: Any) -> None:
    """Alone, in batches of several sizes and all in one; the original pads each to its most patches, the runtime to
    the longest."""
    prepare = AutoProcessor.from_pretrained(source, backend="pil")
    prepare = getattr(prepare, "image_processor", prepare)
    for chosen in (images(), [*images()][::-1][:3]):
        inputs = prepare(images=chosen, return_tensors="pt")
        with torch.inference_mode():
            expected = encode(inputs)
        for batch_size in (1, 4, 6):
            got = bundle.encode_image(chosen, batch_size=batch_size)
            duals.assert_equal(got, expected, [str(image.size) for image in chosen])


def assert_never_traced(bundle: Any) -> None:
    """The images are of six grids, and the back end saw none of them."""
    signature = bundle.manifest.part("vision").signature
    traced = dict(
        zip(
            signature.input_names,
            example_tensors(Part("vision", torch.nn.Module(), signature, NaflexExamples(signature))),
            strict=True,
        )
    )
    grids = {patch_shape(size, bundle.manifest.image) for size in SHAPES}
    assert len(grids) == 6
    assert grids.isdisjoint(map(tuple, traced["spatial_shapes"].tolist()))


@pytest.mark.parametrize("options", duals.BACK_ENDS, ids=" ".join)
def test_both_encoders(naflex: tuple[Path, Any], options: tuple[str, ...], tmp_path: Path) -> None:
    source, model = naflex
    bundle = duals.export(source, tmp_path / "out", *options)
    manifest = bundle.manifest
    assert manifest.family == "siglip2"
    assert manifest.image == PatchSpec(PATCH, PATCHES, "bilinear", "before_resize", (0.5,) * 3, (0.5,) * 3)
    assert (manifest.text.case, manifest.text.padding, manifest.text.pad_token_id) == ("lower", "context", 0)
    assert_never_traced(bundle)
    assert_images_equal(source, bundle, lambda inputs: model.get_image_features(**inputs).pooler_output)
    encode = lambda inputs: model.text_model(inputs["input_ids"]).pooler_output  # noqa: E731
    texts = duals.assert_texts_equal(source, bundle, encode, LENGTH, padding="max_length")
    inputs = AutoProcessor.from_pretrained(source, backend="pil").image_processor(images=images(), return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs, input_ids=texts["input_ids"]).logits_per_image.sigmoid()
    got = bundle.classify(images(), duals.TEXTS, template="{}", truncate=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=duals.MAX_ABS, rtol=0)


def test_fixed_patches_of_the_image_encoder_alone(naflex: tuple[Path, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = duals.spread(Siglip2VisionModel(naflex[1].config.vision_config))
    vision.save_pretrained(tmp_path / "vision")
    image_processor().save_pretrained(tmp_path / "vision")
    bundle = duals.export(
        tmp_path / "vision",
        tmp_path / "out",
        "--opset",
        "17",
        "--set",
        f"fixed_patches={PATCHES}",
        "--precision",
        "fp16",
    )
    shapes = {tensor.name: tensor.shape for tensor in bundle.manifest.part("vision").signature.inputs}
    assert shapes["pixel_values"] == ("batch", PATCHES, 3 * PATCH * PATCH)
    bundle = duals.export(tmp_path / "vision", tmp_path / "fp32", "--opset", "17", "--set", f"fixed_patches={PATCHES}")
    assert_images_equal(tmp_path / "vision", bundle, lambda inputs: vision(**inputs).pooler_output)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (("--set", "fixed_patches=35"), 3, "more patches of an image"),
        (("--set", "fixed_patches=0"), 2, "fixed_patches"),
        (("--image-size", "64"), 2, "images of any shape"),
        (("--dynamic-image-size",), 2, "images of any shape"),
        (("--with-preprocessing",), 2, "--with-preprocessing"),
    ],
)
def test_options_that_do_not_fit(
    naflex: tuple[Path, Any],
    tmp_path: Path,
    options: tuple[str, ...],
    error: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert duals.main(["export", str(naflex[0]), "-o", str(tmp_path / "out"), "--opset", "17", *options]) == error
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"patch_size": 16}, "patches of another size"),
        ({"max_num_patches": 0}, "malformed"),
        ({"max_num_patches": None}, "malformed"),
        ({"max_num_patches": 4096}, "more patches of an image"),
        ({"max_num_patches": 5}, "become one patch wide"),
        ({"do_resize": False}, "not computed here"),
        ({"image_std": [0, 1, 1]}, "malformed"),
        ({"image_processor_type": "SiglipImageProcessor"}, "class of image processors"),
    ],
)
def test_processor_files_that_do_not_fit(
    naflex: tuple[Path, Any], tmp_path: Path, fields: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(naflex[0], tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    data = json.loads(path.read_text())
    data["image_processor"].update(fields)
    path.write_text(json.dumps(data))
    assert duals.main(["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--opset", "17"]) == 3
    assert says in capsys.readouterr().err


def test_positions_are_resampled_for_each_image() -> None:
    table = torch.randn(16 * 16, 8, generator=torch.Generator().manual_seed(0))
    shapes = torch.tensor([[1, 40], [3, 7], [16, 16], [20, 12], [2, 2], [5, 8], [1, 1], [100, 2]])
    expected = Siglip2VisionEmbeddings.resize_positional_embeddings(table.reshape(16, 16, 8), shapes, 256)
    got = positions_of_grids(table, 16, shapes, 256)
    assert float((got - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("patches", [1, 36, 256, 1024])
def test_sizes_are_those_of_the_processor(patches: int) -> None:
    spec = PatchSpec(16, patches, "bilinear", "never", (0.5,) * 3, (0.5,) * 3)
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (1, 5000), (5000, 1), (224, 224), *rng.integers(1, 4000, (60, 2)).tolist()]:
        rows, columns = patch_shape((width, height), spec)
        assert (rows * 16, columns * 16) == get_image_size_for_max_num_patches(height, width, 16, patches)


@pytest.mark.parametrize("name", [name for name in known_names() if load_known(name).family == "siglip2"])
def test_published_keys(name: str) -> None:
    known, family = load_known(name), load_family("siglip2")
    assert isinstance(family, Siglip2Family)
    assert known.source.hub == f"google/{name}"
    config = Siglip2Config.from_dict(json.loads(json.dumps(family.published_config(known.architecture))))
    with meta_modules():
        expected = {key: tuple(tensor.shape) for key, tensor in Siglip2Model(config).state_dict().items()}
    assert {key: info.shape for key, info in family.published_tensors(known.architecture).items()} == expected
