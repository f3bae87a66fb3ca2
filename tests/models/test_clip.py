"""CLIP in eager: the oracle's records, the nine published architectures, and transformers' `CLIPModel`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, Model, Part, StoredTensorInfo
from vlm_export.models.clip import family as clip
from vlm_export.models.clip import weights as clip_weights
from vlm_export.models.clip.architecture import architecture_from_huggingface, architecture_from_openai
from vlm_export.models.clip.encoders import build_encoders
from vlm_export.models.clip.family import ClipFamily
from vlm_export.models.layers.vit_weights import HUGGINGFACE_BLOCK
from vlm_export.models.reading.weights import Rows, WeightTable
from vlm_export.models.registry import recognise
from vlm_export.specs import ImageSpec
from vlm_export.specs.tasks import EmbedSpec, ScoreSpec

DATA = Path(__file__).parents[1] / "data"
FILES = (
    "rn_tiny/jit_archive.pt",
    "vit_w128/jit_archive.pt",
    "vit_p14/state_dict_fp32.pt",
    "vit_p14/state_dict_fp16.pt",
)
# Config, then parameters: all, vision, text. Counted with the classes of openai/CLIP (d05afc4).
PUBLISHED = {
    "RN50": ("clip-rn50", 102_007_137, 38_316_896, 63_690_240),
    "RN101": ("clip-rn101", 119_688_033, 56_259_936, 63_428_096),
    "RN50x4": ("clip-rn50x4", 178_300_601, 87_137_080, 91_163_520),
    "RN50x16": ("clip-rn50x16", 290_979_217, 167_328_912, 123_650_304),
    "RN50x64": ("clip-rn50x64", 623_258_305, 420_380_352, 202_877_952),
    "ViT-B-32": ("clip-vit-b-32", 151_277_313, 87_849_216, 63_428_096),
    "ViT-B-16": ("clip-vit-b-16", 149_620_737, 86_192_640, 63_428_096),
    "ViT-L-14": ("clip-vit-l-14", 427_616_513, 303_966_208, 123_650_304),
    "ViT-L-14-336px": ("clip-vit-l-14-336px", 427_944_193, 304_293_888, 123_650_304),
}
Record = Mapping[str, npt.NDArray[Any]]
Same = Callable[..., None]
Make = Callable[..., Any]


def run(part: Part, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    output: Tensor = part.module(torch.from_numpy(np.ascontiguousarray(array)))
    result: npt.NDArray[Any] = output.numpy()
    return result


def unit(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    normalised: npt.NDArray[Any] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalised


def score_of(model: Model) -> ScoreSpec:
    task = model.task(EmbedSpec)
    assert task is not None
    assert task.score is not None
    return task.score


def build(source: Path, folder: Path) -> Model:
    checkpoint = open_checkpoint(str(source))
    with ScratchStore(folder / "weights.bin") as store:
        return recognise(checkpoint).build(checkpoint, store)


@pytest.mark.parametrize("file", FILES)
def test_features_and_logits_equal_the_record(
    file: str, oracle_model: Callable[[str], Model], oracle_record: Callable[[str], Record], assert_same: Same
) -> None:
    model, record = oracle_model(file), oracle_record(file)
    vision, text = model.parts
    assert (vision.name, text.name) == ("vision", "text")
    image, texts = run(vision, record["input.image"]), run(text, record["input.text"])
    assert_same(image, record["output.image_features"])
    assert_same(texts, record["output.text_features"])
    assert_same(unit(image), record["output.image_features_norm"], 1e-5)
    assert_same(unit(texts), record["output.text_features_norm"], 1e-5)
    logits = score_of(model).scale * unit(image) @ unit(texts).T
    assert_same(logits, record["output.logits_per_image"])
    assert_same(logits.T, record["output.logits_per_text"])
    assert_same(run(vision, record["preprocess.image_png"][None]), record["preprocess.image_features"])


@pytest.mark.parametrize("file", FILES)
def test_architecture_is_the_recorded_one(file: str, oracle_model: Callable[[str], Model]) -> None:
    config = json.loads((DATA / "clip" / file).with_name("meta.json").read_text())["config"]
    found = oracle_model(file).architecture
    vision, text = found["vision"], found["text"]
    layers = list(vision["stages"]) if vision["kind"] == "resnet" else vision["layers"]
    assert (layers, vision["width"], vision["image_size"]) == (
        config["vision_layers"],
        config["vision_width"],
        config["image_resolution"],
    )
    assert (vision["heads"], vision.get("patch_size")) == (config["vision_heads"], config["vision_patch_size"])
    assert (text["width"], text["layers"], text["heads"]) == (
        config["transformer_width"],
        config["transformer_layers"],
        config["transformer_heads"],
    )
    assert (text["context_length"], text["vocab_size"]) == (config["context_length"], config["vocab_size"])
    assert (found["embed_dim"], found["activation"]) == (config["embed_dim"], "quick_gelu")


@pytest.mark.parametrize("file", FILES)
def test_text_cut_after_its_end_equals_full_context(
    file: str, oracle_model: Callable[[str], Model], oracle_record: Callable[[str], Record], assert_same: Same
) -> None:
    text, ids = oracle_model(file).parts[1], oracle_record(file)["input.text"]
    full = run(text, ids)
    for row, features in zip(ids, full, strict=True):
        assert_same(run(text, row[None, : row.argmax() + 1]), features[None], 1e-5)
    # What follows end-of-text is invisible, whatever it is; what precedes it is not.
    noisy = ids.copy()
    end = int(ids[0].argmax())
    noisy[0, end + 1 :] = 7
    assert_same(run(text, noisy), full, 1e-5)
    noisy[0, end - 1] = 8
    assert np.abs(run(text, noisy)[0] - full[0]).max() > 1e-3


def test_both_dtypes_of_a_checkpoint_give_equal_weights(oracle_model: Callable[[str], Model]) -> None:
    half, full = (oracle_model(f"vit_p14/state_dict_{kind}.pt") for kind in ("fp16", "fp32"))
    for left, right in zip(half.parts, full.parts, strict=True):
        weights = right.module.state_dict()
        for name, tensor in left.module.state_dict().items():
            assert tensor.dtype == weights[name].dtype
            assert torch.equal(tensor, weights[name]), name


def _largest_change(
    file: str, record: Record, swapped: dict[str, Any], table: str, patch: pytest.MonkeyPatch, folder: Path
) -> float:
    """How far a swapped weight table moves the record's features."""
    patch.setattr(clip_weights, table, {**getattr(clip_weights, table), **swapped})
    vision, text = build(DATA / "clip" / file, folder).parts
    return max(
        float(np.abs(run(vision, record["input.image"]) - record["output.image_features"]).max()),
        float(np.abs(run(text, record["input.text"]) - record["output.text_features"]).max()),
    )


@pytest.mark.parametrize(
    ("file", "table", "left", "right"),
    [
        ("vit_p14/state_dict_fp32.pt", "OPENAI_BLOCK", "ln_1.weight", "ln_2.weight"),
        ("vit_p14/state_dict_fp32.pt", "OPENAI_VIT", "visual.ln_pre.bias", "visual.ln_post.bias"),
        ("rn_tiny/jit_archive.pt", "OPENAI_ATTENTION_POOL", "q_proj.weight", "k_proj.weight"),
        ("rn_tiny/jit_archive.pt", "BATCH_NORM", "bias", "running_mean"),
    ],
)
def test_swapped_tables_are_caught(
    file: str,
    table: str,
    left: str,
    right: str,
    oracle_record: Callable[[str], Record],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    targets: WeightTable = getattr(clip_weights, table)
    swapped = {left: targets[right], right: targets[left]}
    assert _largest_change(file, oracle_record(file), swapped, table, monkeypatch, tmp_path) > 1e-2


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, list[int]]]:
    """Model name → key → shape, from the original class."""
    data: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress((DATA / "manifests/clip.json.gz").read_bytes()))
    return data


def _unread(key: str) -> Tensor:
    raise AssertionError(f"{key} was read")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_manifests_load_by_shape(name: str, manifests: dict[str, dict[str, list[int]]]) -> None:
    config, total, vision, text = PUBLISHED[name]
    shapes = {key: tuple(shape) for key, shape in manifests[name].items()}
    infos = {key: StoredTensorInfo(shape, "float16") for key, shape in shapes.items()}
    checkpoint = Checkpoint(name, "torchscript", (), infos, _unread)
    assert isinstance(recognise(checkpoint), ClipFamily)
    architecture = architecture_from_openai(checkpoint)
    published = ClipFamily().published_tensors(architecture.to_json())
    counters = {key: shape for key, shape in shapes.items() if key.endswith("num_batches_tracked")}
    assert {key: info.shape for key, info in published.items()} | counters == shapes
    encoders = build_encoders(architecture)
    assert _count(encoders) == total
    assert (_count(encoders.vision), _count(encoders.text)) == (vision, text)
    assert total == vision + text + 1
    description = ClipFamily().describe(checkpoint)
    assert [outline.parameter_count for outline in description.parts] == [vision, text]
    assert json.loads(json.dumps(architecture.to_json())) == load_known(config).architecture


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _texts(eos: int) -> npt.NDArray[Any]:
    """End tokens at the end, early, twice (the first counts), alone, and padding of end tokens."""
    ids = np.random.default_rng(0).integers(3, 500, (5, 20))
    ids[:, 0] = 523
    ids[0, 19] = eos
    ids[1, 4:] = [eos, *[0] * 15]
    ids[2, 6] = ids[2, 11] = eos
    ids[3, :2] = [eos, 0]
    ids[4, 9:] = eos
    return ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("eos", "end"), [(524, 524), (2, 524), (77, 77)], ids=["highest", "legacy", "in the middle"])
def test_huggingface_equals_transformers(
    tmp_path: Path, make_huggingface_clip: Make, eos: int, end: int, act: str, assert_same: Same
) -> None:
    original = make_huggingface_clip(tmp_path / "model", eos=eos, act=act)
    model = build(tmp_path / "model", tmp_path)
    vision, text = model.parts
    assert model.architecture["text"]["pooling"] == ("argmax" if eos == 2 else "first_end_token")
    assert (model.architecture["text"]["end_token_id"], model.architecture["activation"]) == (end, act)
    ids, pixels = _texts(end), np.random.default_rng(1).standard_normal((3, 3, 24, 24)).astype(np.float32)
    with torch.inference_mode():
        image = original.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
        texts = original.get_text_features(torch.from_numpy(ids)).pooler_output.numpy()
    assert_same(run(vision, pixels), image, 1e-5)
    assert_same(run(text, ids), texts, 1e-5)
    # transformers as the Reference gives the same, through the model's own loader.
    for part, array, expected in ((vision, pixels, image), (text, ids, texts)):
        got = model.references[part.name]()({part.signature.input_names[0]: array})
        assert_same(got[part.signature.output_names[0]], expected, 1e-5)
    assert score_of(model).logit_scale == pytest.approx(original.logit_scale.item())


@pytest.mark.parametrize(
    "save",
    [{"max_shard_size": "40KB"}, {"dtype": torch.float16}, {"heads": (4, 2)}],
    ids=["sharded", "float16", "other heads"],
)
def test_huggingface_forms(
    tmp_path: Path, make_huggingface_clip: Make, save: dict[str, Any], assert_same: Same
) -> None:
    original = make_huggingface_clip(tmp_path / "model", **save)
    shards = len(list((tmp_path / "model").glob("*.safetensors")))
    assert (shards > 1) == ("max_shard_size" in save)
    vision, text = build(tmp_path / "model", tmp_path).parts
    ids, pixels = _texts(524), np.random.default_rng(1).standard_normal((2, 3, 24, 24)).astype(np.float32)
    with torch.inference_mode():
        image = original.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
        texts = original.get_text_features(torch.from_numpy(ids)).pooler_output.numpy()
    assert_same(run(vision, pixels), image, 1e-5)
    assert_same(run(text, ids), texts, 1e-5)


def test_swapped_query_and_key_of_huggingface_are_caught(
    tmp_path: Path, make_huggingface_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_huggingface_clip(tmp_path / "model")
    swapped = {
        "self_attn.q_proj.weight": Rows("attn.qkv.weight", 1, 3),
        "self_attn.k_proj.weight": Rows("attn.qkv.weight", 0, 3),
    }
    monkeypatch.setattr(clip_weights, "HUGGINGFACE_BLOCK", {**HUGGINGFACE_BLOCK, **swapped})
    text = build(tmp_path / "model", tmp_path).parts[1]
    with torch.inference_mode():
        expected = original.get_text_features(torch.from_numpy(_texts(524))).pooler_output.numpy()
    assert np.abs(run(text, _texts(524)) - expected).max() > 1e-2


def _change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["text_config"].update(hidden_act="gelu"), "disagree on hidden_act"),
        (lambda c: [c[s].update(hidden_act="silu") for s in ("text_config", "vision_config")], "activation"),
        (lambda c: c["text_config"].update(num_attention_heads=5), "multiple of its heads"),
        (lambda c: c["text_config"].update(num_attention_heads=0), "multiple of its heads"),
        (lambda c: c["vision_config"].update(num_attention_heads="two"), "malformed"),
        (lambda c: c.update(text_config=[1]), "malformed"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    tmp_path: Path, make_huggingface_clip: Make, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    make_huggingface_clip(tmp_path / "model")
    _change_config(tmp_path / "model", change)
    with pytest.raises(InputError, match=what):
        build(tmp_path / "model", tmp_path)


def test_huggingface_weights_alone_do_not_tell_the_heads(tmp_path: Path, make_huggingface_clip: Make) -> None:
    make_huggingface_clip(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json") as caught:
        build(tmp_path / "model" / "model.safetensors", tmp_path)
    assert "beside the weights file" in caught.value.fix


def test_published_normalisation_is_used(tmp_path: Path, make_huggingface_clip: Make) -> None:
    make_huggingface_clip(tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    size = ClipFamily().describe(open_checkpoint(str(tmp_path / "model"))).architecture["vision"]["image_size"]
    edges = {"size": size, "crop_size": size}
    path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], **edges}))
    model = build(tmp_path / "model", tmp_path)
    image = model.image
    assert isinstance(image, ImageSpec)
    assert model.origins.values["image.mean"] == "preprocessor_config.json: image_mean"
    assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    stated = ("{", json.dumps({**edges, "image_mean": [1, 2]}), json.dumps({**edges, "image_std": "x"}))
    for malformed in stated:
        path.write_text(malformed)
        with pytest.raises(InputError, match="malformed"):
            build(tmp_path / "model", tmp_path)
    path.write_text("{}")
    with pytest.raises(InputError, match="different sizes") as caught:
        build(tmp_path / "model", tmp_path)
    assert (caught.value.where, caught.value.got) == ("default of CLIPImageProcessor", "224 x 224")
    assert str(size) in caught.value.expected


def test_describe_reads_no_weight(make_huggingface_clip: Make, tmp_path: Path) -> None:
    make_huggingface_clip(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    unread = Checkpoint(
        checkpoint.source, checkpoint.format, checkpoint.files, checkpoint.tensors, _unread, checkpoint.config
    )
    description = ClipFamily().describe(unread)
    assert [part.name for part in description.parts] == ["vision", "text"]
    assert any("QuickGELU" in note for note in description.notes)


def test_examples_are_valid_and_repeatable(oracle_model: Callable[[str], Model]) -> None:
    vision, text = oracle_model("vit_w128/jit_archive.pt").parts
    for part, sizes in ((vision, {"batch": 3}), (text, {"batch": 4, "sequence": 9})):
        first, again, other = (part.examples(sizes, seed) for seed in (1, 1, 2))
        for spec in part.signature.inputs:
            assert first[spec.name].shape == spec.concrete_shape(sizes)
            assert str(first[spec.name].dtype) == spec.dtype
            assert np.array_equal(first[spec.name], again[spec.name])
            assert not np.array_equal(first[spec.name], other[spec.name])
    ids = text.examples({"batch": 50, "sequence": 9}, 0)["input_ids"]
    assert (ids == 255).sum(axis=1).tolist() == [1] * 50
    assert len(set(ids.argmax(axis=1).tolist())) > 3


def test_transformers_reference_is_loaded_strictly(tmp_path: Path, make_huggingface_clip: Make) -> None:
    make_huggingface_clip(tmp_path / "model")
    model = build(tmp_path / "model", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    fewer = {key: info for key, info in checkpoint.tensors.items() if "k_proj" not in key}
    broken = Checkpoint(checkpoint.source, checkpoint.format, (), fewer, checkpoint.read, checkpoint.config)
    with pytest.raises(RuntimeError, match="k_proj"):
        clip.transformers_reference(
            broken, architecture_from_huggingface(checkpoint), ClipFamily.library, model.parts[0]
        )
