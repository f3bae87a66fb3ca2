"""nanoVLM's modules against what the original computed, its published files by shape, and what is refused."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.bundle_manifest import fp32_operators
from vlm_export.family import BuildOptions, Checkpoint, Model, StoredTensorInfo
from vlm_export.models.layers.rotary_decoder import (
    GroupedQueryAttention,
    RMSNorm,
    RotaryDecoderSizes,
    RotaryPositions,
    grouped_mask,
    rotated,
)
from vlm_export.models.nanovlm.architecture import CHAT_TEMPLATE, NanoVlmArchitecture
from vlm_export.models.nanovlm.family import NanoVlmFamily
from vlm_export.models.nanovlm.parts import build_modules, build_parts, shuffled
from vlm_export.models.reading.weights import Rows, stored_shape
from vlm_export.models.registry import recognise
from vlm_export.specs import ImageSpec, TileSpec
from vlm_export.specs.tasks import ChatSpec

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("nanovlm_oracle.py"))))
Array = npt.NDArray[Any]
Build = Callable[[str], Model]
Edit = Callable[..., Path]
SIZES = RotaryDecoderSizes(width=48, layers=1, heads=6, kv_heads=2, hidden=32, vocab_size=11, positions=64)


@pytest.fixture(scope="module")
def build(models_under: Callable[[Path], Build]) -> Build:
    return models_under(oracle.DATA)


@pytest.fixture
def edit(tmp_path: Path) -> Edit:
    """A copy of a variant with other values in config.json (None: no such key) and other tensors."""

    def copy(variant: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None] | None = None) -> Path:
        target = tmp_path / variant
        shutil.copytree(oracle.DATA / variant, target)
        data = {**json.loads((target / "config.json").read_text(encoding="utf-8")), **config}
        kept = {key: value for key, value in data.items() if value is not None}
        (target / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        if tensors is not None:
            stored = {**load_file(target / "model.safetensors"), **tensors}
            save_file({k: t.clone() for k, t in stored.items() if t is not None}, target / "model.safetensors")
        return target

    return copy


def load(path: Path, folder: Path) -> Model:
    checkpoint = open_checkpoint(str(path))
    with ScratchStore(folder / "store.bin") as store:
        return recognise(checkpoint).build(checkpoint, store)


# What the original computed
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_every_record(variant: str, build: Build) -> None:
    model = build(variant)
    runs = oracle.eager(model)
    for case in oracle.cases(model, variant):
        found = runs[case.part](case.inputs)[case.output]
        np.testing.assert_allclose(found, case.expected, atol=1e-5, rtol=0, err_msg=case.record)
    records = oracle.golden(variant)
    embeds = oracle.embedded(model, runs, oracle.record_prompt(model, runs, variant))
    np.testing.assert_allclose(embeds, records["output.combined_embeds"][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_patches_before_the_projector(variant: str, build: Build) -> None:
    encoder: Any = oracle.part_of(build(variant), "vision_encoder").module
    records = oracle.golden(variant)
    for pixels, name in (
        ("input.random_pixels", "output.vision_random"),
        ("input.pixel_values", "output.vision_image"),
    ):
        with torch.inference_mode():
            found = encoder.vision(torch.from_numpy(records[pixels]))
        np.testing.assert_allclose(found, records[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["450m", "split"])
def test_the_recorded_step(variant: str, build: Build) -> None:
    """One more token after the recorded prompt, with the cache."""
    model, records = build(variant), oracle.golden(variant)
    runs = oracle.eager(model)
    inputs = oracle.decoder_inputs(model, list(records["output.combined_embeds"]))
    embeds = runs["embed_tokens"]({"input_ids": records["output.step_token"]})["inputs_embeds"]
    stepped = runs["decoder"](oracle.next_inputs(inputs, runs["decoder"](inputs), embeds))
    np.testing.assert_allclose(stepped["logits"][:, 0], records["output.step_logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_generated_ids(variant: str, cached: bool, build: Build) -> None:
    model = build(variant)
    runs, expected = oracle.eager(model), oracle.golden(variant)["output.generated_ids_greedy"]
    prompt = oracle.record_prompt(model, runs, variant)
    np.testing.assert_array_equal(oracle.generate(model, runs, [prompt], 12, cached=cached), expected)


# The language model's parts against plain formulas
def test_grouped_queries_are_those_of_repeated_keys() -> None:
    torch.manual_seed(0)
    attention = GroupedQueryAttention(SIZES)
    batch, tokens, past, d = 3, 5, 4, SIZES.head_width
    x, keys, values = torch.randn(batch, tokens, 48), torch.randn(batch, 2, past, d), torch.randn(batch, 2, past, d)
    mask = torch.ones(batch, past + tokens, dtype=torch.int64)
    mask[0, :3] = mask[1, :1] = 0
    rotary = RotaryPositions(SIZES)
    rotary.inv_freq.copy_(1 / SIZES.rope_base ** (torch.arange(0, d, 2) / d))
    cos, sin = rotary(torch.arange(past, past + tokens).expand(batch, -1))
    with torch.inference_mode():
        found, key, value = attention(x, cos, sin, grouped_mask(mask, past, tokens, 3), keys, values)
        q, k, v = attention.qkv(x).split([48, 16, 16], dim=-1)
        query, new_key = (rotated(part.unflatten(-1, (-1, d)), cos, sin).transpose(1, 2) for part in (q, k))
        key_all = torch.cat([keys, new_key], dim=2)
        value_all = torch.cat([values, v.unflatten(-1, (-1, d)).transpose(1, 2)], dim=2)
        visible = torch.ones(tokens, past + tokens).tril(past).bool() & mask.bool()[:, None, None]
        all_keys, all_values = (part.repeat_interleave(3, dim=1) for part in (key_all, value_all))
        expected = torch.nn.functional.scaled_dot_product_attention(query, all_keys, all_values, attn_mask=visible)
        expected = attention.out(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((key, value), (key_all, value_all))


def test_rotation_is_that_of_the_original() -> None:
    """x cos + rotate_half(x) sin, with the frequencies twice beside each other."""
    rotary, d = RotaryPositions(SIZES), SIZES.head_width
    rotary.inv_freq.copy_(1 / SIZES.rope_base ** (torch.arange(0, d, 2) / d))
    positions, x = torch.tensor([[0, 3, 61], [7, 8, 63]]), torch.randn(2, 3, 6, d)
    angles = (positions.float()[..., None] * rotary.inv_freq).repeat(1, 1, 2)[:, :, None]
    first, second = x.chunk(2, dim=-1)
    expected = x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    torch.testing.assert_close(rotated(x, *rotary(positions)), expected, atol=0, rtol=0)


def test_rms_norm_is_that_of_the_original() -> None:
    norm, x = RMSNorm(48, eps=1e-5), torch.randn(2, 3, 48)
    torch.nn.init.normal_(norm.weight)
    expected = x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-6)


def test_hidden_tokens_of_the_mask() -> None:
    attention_mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 0]])
    seen = grouped_mask(attention_mask, 2, 3, 2) == 0
    assert seen.shape == (2, 1, 6, 5)
    # A token of padding sees itself alone, so that no row is empty.
    left = [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    right = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen[:, 0].int().tolist() == [left * 2, right * 2]


def test_squares_of_patches_become_one_feature() -> None:
    tokens = torch.arange(16 * 3).reshape(1, 16, 3)
    first = shuffled(tokens, 4, 2)[0, 0].reshape(2, 2, 3)
    assert first.tolist() == tokens.reshape(4, 4, 3)[:2, :2].tolist()


def test_a_span_of_rows() -> None:
    assert stored_shape(Rows("x", 2, 6, 3), {"x": (12, 5)}) == (6, 5)
    assert stored_shape(Rows("x", 2, 6), {"x": (12, 5)}) == (2, 5)


# Published files
@pytest.mark.parametrize("name", ["nanovlm-222m", "nanovlm-450m", "nanovlm-460m-8k", "v0.2 defaults"])
def test_published_files_load_by_shape(name: str, build: Build) -> None:
    shapes = oracle.read_manifests()[name]
    tied = {key: shape for key, shape in shapes.items() if key != "decoder.token_embedding.weight"}
    has_tiles = "460" in name
    config = json.loads((oracle.DATA / ("split" if has_tiles else "222m") / "config.json").read_text(encoding="utf-8"))
    kept = ("lm_tie_weights", "lm_max_position_embeddings", "vlm_extra_tokens", "lm_chat_template", "max_img_size")
    config = {key: config[key] for key in kept if key in config}
    if has_tiles:
        # The oracle's own is of its tiny tiles.
        config["max_img_size"] = load_known("nanovlm-460m-8k").architecture["chat"]["max_side_pixels"]
    infos = {key: StoredTensorInfo(shape, "float32") for key, shape in tied.items()}
    described = NanoVlmFamily().describe(Checkpoint(name, "safetensors", (), infos, _unread, config))
    counted = {part.name: part.parameter_count for part in described.parts}
    vision, projector, decoder = (
        sum(int(np.prod(shape)) for key, shape in tied.items() if key.startswith(prefix) and "inv_freq" not in key)
        for prefix in ("vision_encoder.", "MP.", "decoder.")
    )
    assert counted["vision_encoder"] == vision + projector
    assert counted["decoder"] == decoder
    published = NanoVlmFamily().published_tensors(described.architecture)
    assert {key: info.shape for key, info in published.items()} == tied


def test_tiles_that_cannot_be_cut_are_refused_by_the_name_in_config_json(edit: Edit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tiles that cannot be cut") as caught:
        load(edit("split", {"max_img_size": 33}), tmp_path)
    assert caught.value.where == "config.json: max_img_size"
    assert "a multiple of tile_size_pixels, 32" in caught.value.expected


def _unread(key: str) -> torch.Tensor:
    raise AssertionError(f"{key} was read")


def chat_of(model: Model) -> ChatSpec:
    chat = model.task(ChatSpec)
    assert chat is not None
    return chat


# What a checkpoint says
def test_layouts(build: Build) -> None:
    chats = {variant: chat_of(build(variant)) for variant in oracle.VARIANTS}
    assert {variant: chat.layout for variant, chat in chats.items()} == {
        "222m": "prepended",
        "450m": "placeholders",
        "split": "tiles",
    }
    assert {variant: chat.image_token_id for variant, chat in chats.items()} == {
        "222m": None,
        "450m": 320,
        "split": 320,
    }
    assert chats["222m"].eos_token_ids == (0,)
    assert chats["450m"].eos_token_ids == chats["split"].eos_token_ids == (2,)
    assert build("split").image == TileSpec(32, 64, resize_to_max_side=True, global_tile=True)
    spec = build("222m").image
    assert isinstance(spec, ImageSpec)
    assert (spec.size_pixels, spec.resize, spec.mean, spec.std) == (64, "stretch", (0, 0, 0), (1, 1, 1))
    text = build("450m").text
    assert text is not None
    assert (text.adds_eos, text.added_tokens, text.end_token_id) == (False, ("<|image|>",), 2)


def test_hosts_find_the_sizes_of_the_cache(build: Build) -> None:
    config, sizes = build("split").hub_config, build("split").hub_config["text_config"]
    assert config["model_type"] == "llava"
    assert config["image_token_index"] == config["image_token_id"] == 320
    assert (sizes["num_key_value_heads"], sizes["num_hidden_layers"], sizes["head_dim"]) == (2, 2, 16)
    assert config["lm_hidden_dim"] == sizes["hidden_size"] == 96
    assert "image_token_index" not in build("222m").hub_config


def test_every_rms_norm_stays_in_float32(build: Build) -> None:
    names = fp32_operators(oracle.part_of(build("222m"), "decoder"))
    assert set(names) == {"norm", *(f"blocks.{i}.norm{n}" for i in (0, 1) for n in (1, 2))}


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_an_architecture_makes_the_file_again(variant: str, build: Build) -> None:
    family, model = NanoVlmFamily(), build(variant)
    data = json.loads(json.dumps(model.architecture))
    assert NanoVlmArchitecture.from_config(data).to_json() == model.architecture
    stored = load_file(oracle.DATA / variant / "model.safetensors")
    published = family.published_tensors(data)
    assert {key: info.shape for key, info in published.items()} == {k: tuple(t.shape) for k, t in stored.items()}
    infos = dict(published)
    again = family.describe(Checkpoint("", "safetensors", (), infos, _unread, family.published_config(data)))
    assert again.architecture == model.architecture
    assert len(again.notes) == 4


# Tied and untied matrices
def test_one_matrix_under_either_name_or_both(edit: Edit, tmp_path: Path, build: Build) -> None:
    head = load_file(oracle.DATA / "222m" / "model.safetensors")["decoder.head.weight"]
    model = load(edit("222m", {}, {"decoder.token_embedding.weight": head}), tmp_path)
    assert model.dropped_keys == ("decoder.token_embedding.weight",)
    shutil.rmtree(tmp_path / "222m")
    renamed = {"decoder.token_embedding.weight": head, "decoder.head.weight": None}
    other = load(edit("222m", {}, renamed), tmp_path)
    for found in (model, other):
        weights = oracle.part_of(found, "decoder").module.state_dict()
        assert torch.equal(weights["head.weight"], head)
        assert not any("embedding" in name for name in weights)


def test_two_matrices(edit: Edit, tmp_path: Path) -> None:
    head = load_file(oracle.DATA / "222m" / "model.safetensors")["decoder.head.weight"]
    both = {"decoder.token_embedding.weight": head.flip(0)}
    model = load(edit("222m", {"lm_tie_weights": False}, both), tmp_path)
    assert torch.equal(oracle.part_of(model, "decoder").module.state_dict()["head.weight"], head)
    table = oracle.part_of(model, "embed_tokens").module.state_dict()["embedding.weight"]
    assert torch.equal(table, head.flip(0))
    shutil.rmtree(tmp_path / "222m")
    with pytest.raises(InputError, match="two different tensors") as caught:
        load(edit("222m", {}, both), tmp_path)
    assert "lm_tie_weights" in str(caught.value)
    shutil.rmtree(tmp_path / "222m")
    with pytest.raises(InputError, match="do not fit") as caught:
        load(edit("222m", {"lm_tie_weights": False}), tmp_path)
    assert "missing: decoder.token_embedding.weight" in str(caught.value)


# What is refused
@pytest.mark.parametrize(
    ("variant", "config", "words"),
    [
        ("222m", {"vit_cls_flag": True}, "class token"),
        ("222m", {"vit_n_heads": 5}, "multiple of its heads"),
        ("222m", {"lm_n_heads": 9}, "lm_n_heads 9, not 6"),
        ("222m", {"lm_n_kv_heads": 6}, "lm_n_kv_heads 6, not 2"),
        ("222m", {"lm_rms_eps": -1}, "lm_rms_eps"),
        ("222m", {"lm_tie_weights": "yes"}, "lm_tie_weights"),
        ("222m", {"lm_max_position_embeddings": 2**20 + 1}, "at most 1048576 positions"),
        ("222m", {"lm_max_position_embeddings": 2**63}, "lm_max_position_embeddings"),
        ("222m", {"lm_eos_token_id": 10**50}, "lm_eos_token_id"),
        ("450m", {"vlm_extra_tokens": {"image_token": "\ud800"}}, "vlm_extra_tokens"),
        ("450m", {"mp_image_token_length": 9}, "mp_image_token_length 9, not 4"),
        ("450m", {"extra_token_amount": 2}, "extra_token_amount 2, not 1"),
        ("450m", {"vlm_extra_tokens": {"image_token": 7}}, "vlm_extra_tokens"),
        ("450m", {"lm_chat_template": "{{ messages }}"}, "or none"),
        ("split", {"lm_chat_template": "{{ messages }}"}, "never executed"),
        ("split", {"lm_chat_template": None}, "lm_chat_template"),
        ("split", {"max_img_size": None}, "max_img_size"),
    ],
)
def test_configs_that_are_refused(variant: str, config: dict[str, Any], words: str, edit: Edit, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(edit(variant, config), tmp_path)
    assert words in str(caught.value)


def test_placeholders_with_a_template_are_messages(edit: Edit, tmp_path: Path) -> None:
    model = load(edit("450m", {"lm_chat_template": CHAT_TEMPLATE}), tmp_path)
    assert chat_of(model).layout == "placeholders"
    assert chat_of(model).prompt.before == "<|im_start|>user\n"


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    shutil.copy(oracle.DATA / "222m" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"needs its config\.json"):
        load(tmp_path / "model.safetensors", tmp_path)


def test_other_sizes_are_refused(build: Build, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(oracle.DATA / "222m"))
    with ScratchStore(tmp_path / "store.bin") as store, pytest.raises(UsageError, match="one image size"):
        NanoVlmFamily().build(checkpoint, store, BuildOptions(image_size=96))


def test_projections_that_no_grid_fits_are_refused(edit: Edit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="squares of patches"):
        load(edit("222m", {}, {"MP.proj.weight": torch.zeros(72, 48 * 3)}), tmp_path)


def test_parts_share_their_weights(build: Build) -> None:
    architecture = NanoVlmArchitecture.from_config(json.loads(json.dumps(build("222m").architecture)))
    modules = build_modules(architecture)
    names = [part.name for part in build_parts(architecture, modules)]
    assert names == ["vision_encoder", "embed_tokens", "decoder"]
    tables = [oracle.part_of(build("222m"), name).module.state_dict() for name in ("embed_tokens", "decoder")]
    assert tables[0]["embedding.weight"].data_ptr() == tables[1]["head.weight"].data_ptr()
