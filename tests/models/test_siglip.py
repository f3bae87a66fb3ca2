"""SigLIP and SigLIP 2 of a fixed resolution as transformers saves them: images and texts in, probabilities out."""

from __future__ import annotations

import io
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GemmaTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTextModel,
    SiglipTokenizer,
    SiglipVisionModel,
)

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.backends import export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint, Model
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.registry import identify, load_family
from vlm_export.models.siglip.family import SiglipFamily
from vlm_export.precision.fp16 import convert_to_fp16
from vlm_export.precision.fp16_rounding import round_every_float16
from vlm_export.runtime.engines.onnxruntime import OrtEngine

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH = 64


def siglip_tokenizer(folder: Path) -> Any:
    """The class of SigLIP on a SentencePiece model with the published one's ids of special tokens."""
    pieces, texts = io.BytesIO(), [text for text in duals.TEXTS if text.strip() and "\0" not in text]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=pieces,
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        # Some characters stay unknown.
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    return SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])


def gemma_tokenizer(folder: Path) -> Any:
    """The class of SigLIP 2, with its ids of special tokens: byte pairs, and bytes for what has no letter."""
    letters = sorted({letter for text in duals.TEXTS for letter in text.replace(" ", "▁")} - set("շქZ龟မ🎂½"))
    merges = [("▁", "c"), ("a", "t"), ("▁c", "at"), ("d", "o"), ("▁▁", "▁")][:4]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
        model_max_length=LENGTH,
    )


def config_of(rows: int, **vision: Any) -> Any:
    text: dict[str, Any] = {**SIZES, "num_hidden_layers": 3, "vocab_size": rows, "max_position_embeddings": LENGTH}
    text |= {"projection_size": 64, "eos_token_id": 1, "bos_token_id": None}
    # A margin of two pixels beside the patches, as in so400m-patch14-384.
    return SiglipConfig(text_config=text, vision_config={**SIZES, "image_size": 34, "patch_size": 16, **vision})


def save(folder: Path, tokenizer: Any, **processor: Any) -> Any:
    """A directory with a whole model of random weights; returns the model."""
    torch.manual_seed(0)
    model = duals.spread(SiglipModel(config_of(len(tokenizer))))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.5)
    model.save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 34, "width": 34}, **processor)
    SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory of SigLIP's first generation, and its model."""
    folder = tmp_path_factory.mktemp("siglip")
    return folder / "model", save(folder / "model", siglip_tokenizer(folder / "pieces"))


def assert_pair_equal(source: Path, bundle: Any, model: Any) -> None:
    """Vectors of both encoders in batches of several sizes, ids, and the probabilities of each pair."""
    pixels = duals.assert_images_equal(source, bundle, lambda pixels: model.vision_model(pixels).pooler_output, 34)
    encode = lambda inputs: model.text_model(inputs["input_ids"]).pooler_output  # noqa: E731
    inputs = duals.assert_texts_equal(source, bundle, encode, LENGTH, padding="max_length")
    with torch.inference_mode():
        expected = model(pixel_values=pixels, input_ids=inputs["input_ids"]).logits_per_image.sigmoid()
    got = bundle.classify(duals.images(34), duals.TEXTS, template="{}", truncate=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=duals.MAX_ABS, rtol=0)
    assert 0.001 < got.min() < got.max() < 0.999


def test_siglip(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    source, model = siglip
    bundle = duals.export(source, tmp_path / "out", "--exporter", "dynamo")
    text = bundle.session.manifest.text
    assert (text.case, text.padding, text.pooling, text.pad_token_id) == ("lower", "context", "last_token", 1)
    assert_pair_equal(source, bundle, model)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_input_names"] == ["input_ids"]


def test_siglip2(tmp_path: Path) -> None:
    """Another filter for images, and Gemma's tokenizer: capital letters stay, and padding has its own id."""
    model = save(tmp_path / "model", gemma_tokenizer(tmp_path), resample=2)
    bundle = duals.export(tmp_path / "model", tmp_path / "out", "--opset", "17")
    text = bundle.session.manifest.text
    assert (text.case, text.padding, text.end_token_id, text.pad_token_id) == ("kept", "context", 1, 0)
    assert bundle.session.manifest.image.resample == "bilinear"
    assert_pair_equal(tmp_path / "model", bundle, model)


def test_float16(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    bundle = duals.export(siglip[0], tmp_path / "out", "--opset", "17", "--precision", "fp16")
    precisions = {part.name: [variant.precision for variant in part.variants] for part in bundle.session.manifest.parts}
    assert precisions == {"vision": ["fp16"], "text": ["fp16"]}


def spread_mlp(model: Any, factor: float) -> None:
    """Hidden values of the image encoder's last MLP that are so much larger, and a projection that takes it back.

    Its activation passes values through that are far from zero, so that the embeddings stay what they are, all but.
    """
    mlp = model.vision_model.encoder.layers[-1].mlp
    with torch.no_grad():
        mlp.fc1.bias.add_(4)
        for parameter in (mlp.fc1.weight, mlp.fc1.bias):
            parameter.mul_(factor)
        mlp.fc2.weight.div_(factor)


def test_float16_of_hidden_values_beyond_its_range(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    """As in SigLIP so400m: float32 is kept where values were seen that float16 does not hold, and only there."""
    source, _ = siglip
    shutil.copytree(source, tmp_path / "model")
    model = SiglipModel.from_pretrained(tmp_path / "model").eval()
    spread_mlp(model, 2.0**15)
    model.save_pretrained(tmp_path / "model")
    bundle = duals.export(tmp_path / "model", tmp_path / "out", "--opset", "17", "--precision", "fp16")
    assert np.isfinite(bundle.encode_image(duals.images(34))).all()
    warnings = {part.name: part.variants[0].warnings for part in bundle.manifest.parts}
    assert len(warnings["vision"]) == 1
    assert warnings["text"] == ()
    graph = ir.load(tmp_path / "out" / "onnx" / "vision_model_fp16.onnx").graph
    products = [node.outputs[0].dtype for node in graph if node.op_type in ("Gemm", "MatMul")]
    assert products.count(ir.DataType.FLOAT) == 2
    # Without the measured ranges the same part overflows wherever float16 is computed as hardware does.
    part = built(identify(open_checkpoint(str(tmp_path / "model")))[1]).parts[0]
    half = convert_to_fp16(finish_graph(simplify_graph(export_part(part, 17, "torchscript")), part.signature))
    round_every_float16(half)
    write_graph(half, tmp_path / "unplanned.onnx")
    inputs = part.examples({"batch": 2}, 0)
    assert not np.isfinite(OrtEngine(tmp_path / "unplanned.onnx", threads=1).run(inputs)["image_embeds"]).all()


def test_preprocessing_in_the_graph(tmp_path: Path) -> None:
    """At a published size: the graph's resize may be off by a level, which few pixels do not even out."""
    torch.manual_seed(0)
    config = config_of(99, image_size=224).vision_config
    SiglipVisionModel(config).eval().save_pretrained(tmp_path / "model")
    SiglipImageProcessorPil().save_pretrained(tmp_path / "model")
    bundle = duals.export(tmp_path / "model", tmp_path / "out", "--opset", "17", "--with-preprocessing")
    assert [part.name for part in bundle.session.manifest.parts] == ["vision", "vision_from_uint8"]


@pytest.mark.parametrize("prefixed", [False, True])
def test_towers(siglip: tuple[Path, Any], tmp_path: Path, prefixed: bool) -> None:
    """As transformers 5 saves them, and with the prefixes that its fourth version gave their keys."""
    config, pieces = siglip[1].config, siglip[0].parent / "pieces"
    torch.manual_seed(0)
    text, vision = (
        duals.spread(SiglipTextModel(config.text_config)),
        duals.spread(SiglipVisionModel(config.vision_config)),
    )
    for name, model in (("text", text), ("vision", vision)):
        model.save_pretrained(tmp_path / name)
        if prefixed:
            weights = tmp_path / name / "model.safetensors"
            save_file({f"{name}_model.{key}": value for key, value in load_file(weights).items()}, weights)
    SiglipTokenizer(str(pieces / "spiece.model"), model_input_names=["input_ids"]).save_pretrained(tmp_path / "text")
    SiglipImageProcessorPil(size={"height": 34, "width": 34}).save_pretrained(tmp_path / "vision")
    bundle = duals.export(tmp_path / "text", tmp_path / "texts", "--opset", "17")
    assert bundle.session.manifest.part("text").signature.output_names == ("pooler_output",)
    encode = lambda inputs: text(inputs["input_ids"]).pooler_output  # noqa: E731
    duals.assert_texts_equal(tmp_path / "text", bundle, encode, LENGTH, padding="max_length")
    bundle = duals.export(tmp_path / "vision", tmp_path / "images", "--opset", "17")
    duals.assert_images_equal(tmp_path / "vision", bundle, lambda pixels: vision(pixels).pooler_output, 34)


def opened(siglip: tuple[Path, Any]) -> Checkpoint:
    return identify(open_checkpoint(str(siglip[0])))[1]


def built(checkpoint: Checkpoint, options: BuildOptions = DEFAULT_BUILD) -> Model:
    class MemoryStore:
        def new(self, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.zeros(shape)

    return SiglipFamily().build(checkpoint, MemoryStore(), options)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (BuildOptions(image_size=64), {"batch": 2}),
        (BuildOptions(dynamic_image_size=True), {"batch": 1, "height": 48, "width": 80}),
    ],
    ids=["fixed", "dynamic"],
)
def test_another_size_of_images(siglip: tuple[Path, Any], options: BuildOptions, sizes: dict[str, int]) -> None:
    """Positions are resampled as transformers does where it is asked to."""
    model = built(opened(siglip), options)
    part = model.parts[0]
    inputs = part.examples(sizes, 0)
    with torch.inference_mode():
        got = part.module(torch.from_numpy(inputs["pixel_values"]))
        vision = siglip[1].vision_model
        expected = vision(torch.from_numpy(inputs["pixel_values"]), interpolate_pos_encoding=True).pooler_output
    duals.assert_equal(got, expected, [str(sizes)] * len(got))


def stating(checkpoint: Checkpoint, path: str, value: object) -> Checkpoint:
    config = json.loads(json.dumps(checkpoint.config))
    *sections, key = path.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return replace(checkpoint, config=config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.vocab_size", 7),
        ("text_config.max_position_embeddings", 77),
        ("text_config.projection_size", 32),
        ("text_config.hidden_act", "relu"),
        ("text_config.layer_norm_eps", 1e-5),
        ("vision_config.vision_use_head", False),
        ("vision_config.num_channels", 1),
        ("vision_config.image_size", 64),
        ("vision_config.num_hidden_layers", 9),
        ("model_type", "siglip_text_model"),
    ],
)
def test_what_config_json_may_not_say(siglip: tuple[Path, Any], path: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        built(stating(opened(siglip), path, value))
    assert "config.json" in caught.value.where


def test_a_checkpoint_without_its_config(siglip: tuple[Path, Any]) -> None:
    with pytest.raises(InputError, match=r"needs its config\.json"):
        built(replace(opened(siglip), config=None))


def test_sizes_of_images_where_there_is_no_image_encoder(tmp_path: Path) -> None:
    SiglipTextModel(config_of(99).text_config).save_pretrained(tmp_path)
    checkpoint = identify(open_checkpoint(str(tmp_path)))[1]
    with pytest.raises(UsageError, match="no image encoder"):
        built(checkpoint, BuildOptions(image_size=48))


@pytest.mark.parametrize("name", [name for name in known_names() if load_known(name).family == "siglip"])
def test_published_keys(name: str) -> None:
    known, family = load_known(name), load_family("siglip")
    assert isinstance(family, SiglipFamily)
    assert known.source.hub == f"google/{name}"
    config = SiglipConfig.from_dict(json.loads(json.dumps(family.published_config(known.architecture))))
    with meta_modules():
        expected = {key: tuple(tensor.shape) for key, tensor in SiglipModel(config).state_dict().items()}
    assert {key: info.shape for key, info in family.published_tensors(known.architecture).items()} == expected
