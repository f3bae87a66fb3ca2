"""BLIP in eager: the records of the original, and files that do not fit."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions, Model, reference_from_module
from vlm_export.models.blip.architecture import BlipArchitecture, architecture_from_checkpoint
from vlm_export.models.blip.family import BlipFamily
from vlm_export.models.registry import recognise
from vlm_export.specs import ImageSpec
from vlm_export.specs.tasks import AnswerSpec, MatchSpec

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blip_oracle.py"))))
VARIANTS: tuple[str, ...] = oracle.VARIANTS
PARTS = {
    "caption": ["vision", "cross_key_values", "text_decoder"],
    "feature_extractor": ["vision", "text", "multimodal_text", "cross_key_values", "text_decoder"],
    "retrieval": ["vision", "text", "multimodal_text"],
    "vqa": ["vision", "vqa_encoder", "cross_key_values", "text_decoder"],
}
Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Build = Callable[..., Model]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(build_model: Build) -> dict[str, Model]:
    return {variant: build_model(oracle.checkpoint_path(variant)) for variant in VARIANTS}


def runner(model: Model) -> Callable[[str, Arrays], Arrays]:
    """A Part's name and its inputs by name → its outputs by name, in eager."""
    references = {part.name: reference_from_module(part) for part in model.parts}
    return lambda name, inputs: references[name](inputs)


def assert_same(found: Array, expected: Array, what: str, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape, what
    difference, limit = float(np.abs(found - expected).max()), relative * max(1.0, float(np.abs(expected).max()))
    assert difference <= limit, f"{what}: {difference:.1e}, limit {limit:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_record(variant: str, models: dict[str, Model]) -> None:
    record, model = oracle.read_record(variant), models[variant]
    assert [part.name for part in model.parts] == PARTS[variant]
    found = dict(oracle.outputs(variant, record, runner(model)))
    for name, array in found.items():
        assert_same(array, record[name], name)
    recorded = {name for name in record if not name.startswith(("input", "output_resized.", "preprocess.image_png"))}
    assert set(found) == recorded - set(oracle.BY_THE_RUNTIME)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_image_size_resamples_the_positions_as_the_original_does(variant: str, build_model: Build) -> None:
    record, size = oracle.read_record(variant), oracle.read_meta(variant)["config"]["image_size_resized"]
    model = build_model(oracle.checkpoint_path(variant), BuildOptions(image_size=size))
    positions = model.parts[0].module.get_parameter("vision.position_embedding").numpy()
    assert_same(positions[None], record["output_resized.pos_embed_interpolated"], "positions", 1e-6)
    tokens = runner(model)("vision", {"pixel_values": record["input.image_resized"]})["last_hidden_state"]
    assert_same(tokens, record["output_resized.image_embeds"], "tokens")
    assert isinstance(model.image, ImageSpec)
    assert (model.image.size_pixels, model.architecture["vision"]["image_size"]) == (size, size)
    # Cross-attention's longest input follows the image.
    longest = {"vqa": model.architecture["encoder"] and 64}.get(variant, tokens.shape[1])
    axes = [axis for part in model.parts for axis in part.signature.axes if axis.name == "encoder_sequence"]
    assert axes[-1].maximum == longest


@pytest.mark.parametrize("variant", ["caption", "vqa"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_cached_steps_equal_the_teacher_forced_record(
    variant: str, chunks: tuple[int, ...], models: dict[str, Model]
) -> None:
    record, run = oracle.read_record(variant), runner(models[variant])
    ids, mask, inputs = oracle.decoder_case(variant, record, run)
    logits = oracle.decode_in_chunks(run, ids[:, : sum(chunks)], mask[:, : sum(chunks)], inputs, chunks)
    assert_same(logits, record["output.logits_teacher_forced"][:, : sum(chunks)], "logits")


@pytest.mark.parametrize("variant", VARIANTS)
def test_architecture_and_tokens_are_the_recorded_ones(variant: str, models: dict[str, Model]) -> None:
    model, meta = models[variant], oracle.read_meta(variant)
    vit, med, tokens = meta["config"]["vit"], meta["config"]["med_config"], meta["tokenizer"]
    vision = model.architecture["vision"]
    assert (vision["patch_size"], vision["width"], vision["layers"], vision["heads"]) == (
        vit["patch"],
        vit["width"],
        vit["depth"],
        vit["heads"],
    )
    assert (vision["image_size"], vision["eps"]) == (meta["config"]["image_size"], 1e-6)
    for name in ("encoder", "decoder"):
        sizes = model.architecture[name]
        if sizes is not None:
            assert (sizes["width"], sizes["hidden"], sizes["layers"], sizes["heads"]) == (
                med["hidden_size"],
                med["intermediate_size"],
                med["num_hidden_layers"],
                med["num_attention_heads"],
            )
            assert (sizes["positions"], sizes["eps"]) == (med["max_position_embeddings"], 1e-12)
    assert model.architecture["tokens"] == {
        "cls": tokens["cls"],
        "sep": tokens["sep/eos"],
        "pad": tokens["pad"],
        "decoder_start": tokens["bos [DEC]"],
        "encoder_start": tokens["[ENC]"],
    }
    assert BlipArchitecture.from_config(model.architecture).to_json() == model.architecture


def test_what_training_leaves_is_dropped_by_name(models: dict[str, Model]) -> None:
    for variant in ("feature_extractor", "retrieval"):
        keys = set(open_checkpoint(str(oracle.checkpoint_path(variant))).tensors)
        momentum = {key for key in keys if "_m." in key}
        queues = {key for key in keys if key.endswith(("queue", "queue_ptr", "queue_total", "temp"))}
        assert len(momentum) > 40
        assert queues >= {"image_queue", "text_queue", "temp"}
        tied = {"text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.bias"}
        buffers = {key for key in keys if key.endswith("position_ids")}
        assert set(models[variant].dropped_keys) == momentum | queues | buffers | (tied & keys)


def test_the_last_of_two_tied_copies_counts_as_in_the_original(models: dict[str, Model], tmp_path: Path) -> None:
    weights = original_weights("caption")
    weights["text_decoder.bert.embeddings.word_embeddings.weight"].add_(1.0)
    weights["text_decoder.cls.predictions.bias"].add_(1.0)
    changed, whole = built(weights, tmp_path), models["caption"]
    for left, right in zip(changed.parts, whole.parts, strict=True):
        for name, tensor in right.module.state_dict().items():
            assert torch.equal(left.module.state_dict()[name], tensor), name


def test_tasks_of_each_kind(models: dict[str, Model]) -> None:
    kinds = {variant: [task.kind for task in model.tasks] for variant, model in models.items()}
    assert kinds["vqa"] == ["answer"]
    assert kinds["caption"] == ["caption"]
    assert kinds["retrieval"] == ["embed", "match"]
    # A pre-training file has everything.
    assert kinds["feature_extractor"] == ["embed", "match", "caption"]
    answer, match = models["vqa"].task(AnswerSpec), models["retrieval"].task(MatchSpec)
    assert answer is not None
    assert answer.question_first_token == "enc"
    assert match is not None
    assert (match.first_token, match.max_text_tokens) == ("enc", 35)
    assert match.tokens.to_json() == models["retrieval"].architecture["tokens"]
    image = models["caption"].image
    assert isinstance(image, ImageSpec)
    assert (image.resize, image.rgb_stage, image.resample) == ("stretch", "before_resize", "bicubic")


def test_random_weights_of_a_known_architecture_build(models: dict[str, Model], tmp_path: Path) -> None:
    for variant, model in models.items():
        family = BlipFamily()
        tensors = family.published_tensors(model.architecture)
        checkpoint = random_checkpoint(variant, tensors, 0, tmp_path / "random.safetensors", None)
        assert architecture_from_checkpoint(checkpoint).to_json() == model.architecture
        with ScratchStore(tmp_path / "weights.bin") as store:
            assert [part.name for part in family.build(checkpoint, store).parts] == PARTS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_inspect(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(oracle.checkpoint_path(variant)), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["family"] == "blip"
    assert [part["name"] for part in data["parts"]] == PARTS[variant]
    assert all(part["parameters"] > 0 for part in data["parts"])
    notes = " ".join(data["notes"])
    assert ("tensors of training" in notes) == (variant in ("feature_extractor", "retrieval"))
    assert "keep [CLS]" not in notes


# Files that do not fit.


def original_weights(variant: str) -> Weights:
    weights: Weights = torch.load(oracle.checkpoint_path(variant), weights_only=True)["model"]
    return {key: tensor.clone() for key, tensor in weights.items()}


def built(weights: Weights, folder: Path, options: BuildOptions | None = None) -> Model:
    torch.save({"model": weights}, folder / "model.pth")
    checkpoint = open_checkpoint(str(folder / "model.pth"))
    with ScratchStore(folder / "weights.bin") as store:
        return recognise(checkpoint).build(checkpoint, store, options or BuildOptions())


def error_of(weights: Weights, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        built(weights, folder)
    return str(caught.value)


def test_missing_unexpected_and_wrongly_shaped_keys_are_listed_together(tmp_path: Path) -> None:
    weights = original_weights("vqa")
    del weights["text_encoder.encoder.layer.0.crossattention.output.dense.bias"]
    weights["text_encoder.pooler.dense.weight"] = torch.zeros(2, 2)
    weights["text_decoder.cls.predictions.transform.dense.bias"] = torch.zeros(3)
    message = error_of(weights, tmp_path)
    assert "missing: text_encoder.encoder.layer.0.crossattention.output.dense.bias" in message
    assert "unexpected: text_encoder.pooler.dense.weight (2, 2)" in message
    assert "shape: text_decoder.cls.predictions.transform.dense.bias expected (64,), got (3,)" in message


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        # The original drops each of them without a word and runs on with random values.
        ("visual_encoder.cls_token", (1, 1, 32)),
        ("itm_head.weight", (3, 64)),
        ("text_encoder.encoder.layer.0.intermediate.dense.bias", (5,)),
    ],
)
def test_a_mismatching_shape_is_an_error_and_no_silent_drop(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weights = original_weights("retrieval")
    assert weights[key].shape != shape
    assert f"shape: {key}" in error_of({**weights, key: torch.zeros(shape)}, tmp_path)


@pytest.mark.parametrize(
    ("key", "shape", "what"),
    [
        ("visual_encoder.pos_embed", (1, 1, 64), "no row for a patch"),
        ("visual_encoder.pos_embed", (1, 12, 64), "11 patches, which is no square"),
        ("text_encoder.embeddings.position_embeddings.weight", (4097, 64), "too long"),
    ],
)
def test_position_tables_that_no_graph_fits_are_refused(
    key: str, shape: tuple[int, ...], what: str, tmp_path: Path
) -> None:
    assert what in error_of({**original_weights("retrieval"), key: torch.zeros(shape)}, tmp_path)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("caption", "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"),
        ("caption", "text_decoder.bert.embeddings.position_embeddings.weight"),
        ("caption", "visual_encoder.patch_embed.proj.weight"),
        ("retrieval", "text_encoder.embeddings.word_embeddings.weight"),
        ("vqa", "text_encoder.embeddings.word_embeddings.weight"),
        ("vqa", "text_encoder.encoder.layer.0.crossattention.self.key.weight"),
        ("retrieval", "text_proj.bias"),
    ],
)
def test_a_missing_key_is_named(variant: str, key: str, tmp_path: Path) -> None:
    weights = original_weights(variant)
    del weights[key]
    assert key in error_of(weights, tmp_path)


@pytest.mark.parametrize(("variant", "prefix"), [("caption", "text_decoder."), ("vqa", "text_encoder.")])
def test_what_must_read_states_needs_cross_attention(variant: str, prefix: str, tmp_path: Path) -> None:
    weights = original_weights(variant)
    left = {key: t for key, t in weights.items() if not (key.startswith(prefix) and ".crossattention." in key)}
    assert "no cross-attention" in error_of(left, tmp_path)


def test_not_finite_weights_and_images_of_any_size_are_refused(tmp_path: Path) -> None:
    weights = original_weights("caption")
    weights["text_decoder.bert.encoder.layer.0.crossattention.self.query.bias"][3] = float("nan")
    assert "crossattention.self.query.bias" in error_of(weights, tmp_path)
    with pytest.raises(UsageError, match="one image size"):
        built(original_weights("caption"), tmp_path, BuildOptions(dynamic_image_size=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["retrieval", "vqa"])
def test_half_precision_files_give_their_rounded_weights(
    variant: str, dtype: torch.dtype, tmp_path: Path, build_model: Build
) -> None:
    weights = original_weights(variant)
    rounded = {key: t.to(dtype) if t.is_floating_point() else t for key, t in weights.items()}
    torch.save({"model": rounded}, tmp_path / "half.pth")
    torch.save({"model": {key: t.float() for key, t in rounded.items()}}, tmp_path / "full.pth")
    half, full = build_model(tmp_path / "half.pth"), build_model(tmp_path / "full.pth")
    for left, right in zip(half.parts, full.parts, strict=True):
        for name, tensor in left.module.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, right.module.state_dict()[name]), name
