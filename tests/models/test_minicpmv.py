"""MiniCPM-V's modules against what the originals computed, and its published files by shape."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions, Checkpoint, Model, StoredTensorInfo
from vlm_export.models.layers import navit
from vlm_export.models.layers.navit import LARGEST_SIDE, bucket_starts, bucketed_positions, one_row
from vlm_export.models.layers.resampler import sine_positions
from vlm_export.models.minicpmv.architecture import VisionArchitecture
from vlm_export.models.minicpmv.family import MiniCpmVFamily
from vlm_export.models.reading import weights
from vlm_export.models.registry import FAMILIES, load_family, read_prefixes, recognise
from vlm_export.runtime.inputs.slices import patchify
from vlm_export.specs import SliceSpec
from vlm_export.specs.tasks import FeatureSpec

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("minicpmv_oracle.py"))))
Array = npt.NDArray[Any]
Build = Callable[[str], Model]
VERSIONS = {"v1_0": "1.0", "v2_0": "2.0", "v2_5": "2.5", "v2_6": "2.6", "v4_5": "4.5"}
# Of the encoder and the resampler, as the originals count them.
PUBLISHED = {
    "minicpmv-1": (412_987_248, 29_514_240),
    "minicpmv-2": (397_747_744, 29_514_240),
    "minicpmv-2.5": (417_792_240, 89_038_848),
    "minicpmv-2.6": (417_792_240, 68_619_264),
    "minicpmv-4": (417_792_240, 35_906_560),
    "minicpmv-4.5": (417_792_240, 88_907_776),
    "omnilmm-12b": (4_280_795_904, 91_791_360),
}


@pytest.fixture(scope="module")
def build(models_under: Callable[[Path], Build]) -> Build:
    return models_under(oracle.DATA)


# What the originals computed
@pytest.mark.parametrize("variant", [*oracle.GRID, *oracle.PACKED])
def test_every_record(variant: str, build: Build) -> None:
    model = build(variant)
    cases = oracle.cases(variant)
    assert {case.part for case in cases} == {part.name for part in model.parts}
    for case in cases:
        found = oracle.run_module(oracle.part_of(model, case.part), case.inputs)
        expected = oracle.valid(case, case.expected)
        np.testing.assert_allclose(oracle.valid(case, found), expected, atol=1e-5, rtol=0, err_msg=str(case[:2]))


@pytest.mark.parametrize(("variant", "grid"), [("v2_6", 12), ("v4_5", 10)])
def test_recorded_position_ids(variant: str, grid: int) -> None:
    records = {k: ids for k, ids in oracle.golden(variant).items() if k.startswith(oracle.POSITION_IDS)}
    assert len(records) == 12
    for key, expected in records.items():
        rows, columns = map(int, key.removeprefix(oracle.POSITION_IDS).split("x"))
        # With padding behind it, as in a batch.
        found = bucketed_positions(torch.tensor([[rows, columns]]), rows * columns + 3, bucket_starts(grid))[0]
        np.testing.assert_array_equal(found[:-3], expected, err_msg=key)
        assert not found[-3:].any()


@pytest.mark.parametrize("grid", [10, 70])
def test_buckets_are_those_of_the_original(grid: int) -> None:
    """For all numbers of patches, as `torch.arange` and `torch.bucketize` give them."""
    bounds, starts = torch.arange(1 / grid, 1.0, 1 / grid), bucket_starts(grid)
    divided, multiplied = [], []
    for count in [*range(1, 300), *range(300, LARGEST_SIDE + 1, 37)]:
        step, places = float(1 / torch.tensor(count)), torch.arange(count)
        expected = torch.bucketize(torch.arange(0, 1 - 1e-6, step), bounds, right=True)
        assert torch.equal((starts[count] <= places[:, None]).sum(1), expected), count
        if not torch.equal(expected, places * grid // count):
            divided.append(count)
        if not torch.equal(expected, torch.bucketize(places * torch.tensor(step), bounds, right=True)):
            multiplied.append(count)
    # What is not the same, although it looks so.
    assert divided[:6] == [25, 50, 55, 58, 82, 86] if grid == 10 else [25, 49, 50, 55, 58, 77]
    assert multiplied[:3] == ([58, 86, 100] if grid == 10 else [49, 58, 77])


def test_grids_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.arange` gives one boundary too many for 3, 6, 7, 14, 19, …; the original never reaches it."""
    monkeypatch.setattr(navit, "LARGEST_SIDE", 200)
    fractions = [torch.arange(0, 1 - 1e-6, float(1 / torch.tensor(count))) for count in range(1, 201)]
    for grid in range(1, 129):
        bounds, starts = torch.arange(1 / grid, 1.0, 1 / grid), bucket_starts.__wrapped__(grid)
        expected = torch.cat([torch.bucketize(values, bounds, right=True) for values in fractions])
        found = [(starts[count] <= torch.arange(count)[:, None]).sum(1) for count in range(1, 201)]
        assert torch.equal(torch.cat(found), expected), grid
        assert expected.max() < grid


def test_recorded_resampler_positions() -> None:
    expected = oracle.golden("v2_0")[oracle.POSITIONS]
    rows, columns = torch.arange(2).repeat_interleave(7), torch.arange(7).repeat(2)
    np.testing.assert_allclose(sine_positions(rows, columns, expected.shape[1]), expected, atol=1e-6)


@pytest.mark.parametrize("variant", oracle.PACKED)
def test_recorded_patches(variant: str) -> None:
    records = oracle.golden(variant)
    np.testing.assert_array_equal(oracle.packed(records["input.image_0"]), records["input.patches_0"])
    np.testing.assert_array_equal(patchify(records["input.image_0"], oracle.PATCH), records["input.patches_0"])


@pytest.mark.parametrize("variant", [*oracle.GRID, *oracle.PACKED])
def test_the_halves_are_the_whole(variant: str, build: Build) -> None:
    model = build(variant)
    whole, tokens, resampler = (oracle.part_of(model, name) for name in ("vision", "vision_tokens", "resampler"))
    sizes = {"batch": 3, "height": 70, "width": 42, "side": 42, "packed_width": 14 * 13}
    inputs = whole.examples(sizes, 0)
    split = {**inputs, "image_tokens": oracle.run_module(tokens, inputs)}
    np.testing.assert_array_equal(oracle.run_module(resampler, split), oracle.run_module(whole, inputs))


@pytest.mark.parametrize("variant", oracle.PACKED)
def test_images_of_a_batch_do_not_change_one_another(variant: str, build: Build) -> None:
    """Also in 2.5, where in the original they do: as each image alone is the original's own result."""
    records = oracle.golden(variant)
    whole = oracle.part_of(build(variant), "vision")
    batch = next(case for case in oracle.cases(variant) if case.record == "output.vpm_batch").inputs
    sizes = records["input.tgt_sizes"].astype(np.int64)
    found = oracle.run_module(whole, {**batch, "tgt_sizes": sizes})
    for i, features in enumerate(found):
        np.testing.assert_allclose(features, records[f"output.resampler_single_{i}"][0], atol=1e-5)
    together = np.abs(found - records["output.resampler_batch"]).max(axis=(1, 2))
    assert (together > 0.1).sum() == (3 if variant == "v2_5" else 0)


def test_one_row() -> None:
    sizes = torch.tensor([[3, 5], [1, 7]])
    assert one_row(sizes).tolist() == [[1, 15], [1, 7]]
    assert torch.equal(one_row(one_row(sizes)), one_row(sizes))


# What a checkpoint says
@pytest.mark.parametrize(("variant", "version"), VERSIONS.items())
def test_versions(variant: str, version: str, build: Build) -> None:
    model = build(variant)
    assert model.architecture["version"] == version
    assert model.tasks == (FeatureSpec("vision"),)
    assert isinstance(model.image, SliceSpec)
    assert model.dropped_keys
    assert all(key.startswith("llm.") for key in model.dropped_keys)
    assert ("video_resampler" in [part.name for part in model.parts]) == (version == "4.5")


def opened(variant: str) -> Checkpoint:
    return open_checkpoint(str(oracle.DATA / variant))


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, config={**(checkpoint.config or {}), **changes})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 3.1}, "version of MiniCPM-V is not known"),
        ({"version": "new"}, "version of MiniCPM-V is not known"),
        ({"vision_config": {"num_attention_heads": 5}}, "multiple of its heads"),
        ({"vision_config": 3}, "malformed"),
        ({"slice_config": {"scale_resolution": "wide"}}, "malformed"),
        ({"vision_config": {"num_attention_heads": 3, "hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {"num_attention_heads": 3, "layer_norm_eps": 0.1}}, "layer_norm_eps"),
        ({"vision_config": {"num_attention_heads": 3, "patch_size": 7}}, "contradicts"),
        ({"vision_config": {"num_attention_heads": 3, "num_hidden_layers": 3}}, "contradicts"),
        ({"drop_vision_last_layer": True}, "contradicts"),
        ({"drop_vision_last_layer": "no"}, "malformed"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        MiniCpmVFamily().describe(with_config(opened("v2_6"), **change))


def test_a_dropped_layer_is_one_that_the_file_lacks() -> None:
    """The file's two layers are all that the original builds of three; where nobody says so, the file counts."""
    vision = {"num_attention_heads": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    three = {**vision, "num_hidden_layers": 3}
    for change in (
        {"vision_config": three, "drop_vision_last_layer": True},
        {"vision_config": three, "drop_vision_last_layer": None},
        {"vision_config": vision, "drop_vision_last_layer": True},
    ):
        described = MiniCpmVFamily().describe(with_config(opened("v2_6"), **change))
        assert described.architecture["vision"]["layers"] == 2


def test_a_config_is_needed() -> None:
    with pytest.raises(InputError, match=r"needs its config.json"):
        MiniCpmVFamily().describe(replace(opened("v2_0"), config=None))


def test_a_config_without_a_version_is_2_6() -> None:
    checkpoint = opened("v2_6")
    config = {key: value for key, value in (checkpoint.config or {}).items() if key != "version"}
    assert MiniCpmVFamily().describe(replace(checkpoint, config=config)).architecture["version"] == "2.6"


@pytest.mark.parametrize("removed", ["vpm.encoder.layers.1.mlp.fc2.bias", "resampler.proj"])
def test_missing_keys_are_named(removed: str) -> None:
    checkpoint = opened("v2_6")
    tensors = {key: info for key, info in checkpoint.tensors.items() if key != removed}
    with pytest.raises(InputError, match=f"missing: {removed}"):
        MiniCpmVFamily().build(replace(checkpoint, tensors=tensors), oracle.MetaStore())


def test_unexpected_keys_of_the_vision_modules_are_named() -> None:
    checkpoint = opened("v2_6")
    tensors = {**checkpoint.tensors, "vpm.head.probe": StoredTensorInfo((1, 1, 96), "bfloat16")}
    with pytest.raises(InputError, match=r"unexpected: vpm.head.probe"):
        MiniCpmVFamily().build(replace(checkpoint, tensors=tensors), oracle.MetaStore())


def test_sizes_are_no_options() -> None:
    with pytest.raises(UsageError, match="any size already"):
        MiniCpmVFamily().build(opened("v2_0"), oracle.MetaStore(), BuildOptions(dynamic_image_size=True))


# The published files
def published(name: str) -> Checkpoint:
    """The vision modules' keys and shapes as published, with a key of the language model, and without weights."""
    known = load_known(name)
    family = load_family(known.family)
    infos = {key: StoredTensorInfo(shape, "bfloat16") for key, shape in oracle.read_manifests()[name].items()}
    infos["model.norm.weight" if known.family == "omnilmm" else "llm.lm_head.weight"] = StoredTensorInfo(
        (8, 8), "bfloat16"
    )
    config = family.published_config(known.architecture)
    return Checkpoint(name, "hf_directory", (), infos, lambda key: oracle.MetaStore().new(infos[key].shape), config)


def test_every_config_has_its_manifest() -> None:
    families = ("minicpmv", "omnilmm")
    names = [name for name in known_names() if load_known(name).family in families]
    assert set(names) == set(PUBLISHED) == set(oracle.read_manifests())
    assert set(families) < set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_manifests_load_by_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # There are no values to look at.
    monkeypatch.setattr(weights, "_check_finite", lambda key, tensor: None)
    checkpoint, known = published(name), load_known(name)
    family = recognise(checkpoint)
    assert family.name == known.family
    # The config, the shapes and the family's own JSON tell of one architecture.
    architecture = VisionArchitecture.from_config(known.architecture)
    assert family.describe(checkpoint).architecture == architecture.to_json()
    model = family.build(checkpoint, oracle.MetaStore())
    assert (model.architecture, len(model.dropped_keys)) == (architecture.to_json(), 1)
    counts = {"vision": 0, "resampler": 0}
    for key, shape in oracle.read_manifests()[name].items():
        counts["resampler" if "resampler." in key else "vision"] += int(np.prod(shape))
    assert tuple(counts.values()) == PUBLISHED[name]
    tensors = family.published_tensors(known.architecture)
    assert {key: info.shape for key, info in tensors.items()} == oracle.read_manifests()[name]
    assert {info.dtype for info in tensors.values()} == {"float16" if name == "minicpmv-2.5" else "bfloat16"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_hold_what_the_original_counts(name: str) -> None:
    parts = {part.name: part for part in recognise(published(name)).describe(published(name)).parts}
    vision, resampler = PUBLISHED[name]
    # EVA stores no bias of keys, which is zero.
    vision += 63 * 1792 if name == "omnilmm-12b" else 0
    counts = {part: outline.parameter_count for part, outline in parts.items()}
    expected = {"vision": vision + resampler, "vision_tokens": vision, "resampler": resampler}
    assert counts == ({**expected, "video_resampler": resampler} if name == "minicpmv-4.5" else expected)
    assert parts["vision"].signature.outputs[0].shape[2] == load_known(name).architecture["resampler"]["width"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 2.0}, "text only in quotes"),
        ({"version": "3.0"}, r"field 'version'[\s\S]*'2.0'"),
        ({"vision": {"kind": "vit", "width": 1152}}, r"missing fields[\s\S]*no layers, heads"),
        ({"vision": {"width": 1152}}, r"field 'kind'[\s\S]*'vit', 'navit'"),
        ({"version": "2.6"}, "the sizes of the vision transformer of version 2.6"),
        ({"resampler": {"querys": 64}}, "did you mean 'queries'"),
        ({"layers": 3}, "unknown field 'layers'"),
    ],
)
def test_architectures_that_are_refused(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        VisionArchitecture.from_config({**load_known("minicpmv-2").architecture, **change})


# Which keys are read
@pytest.mark.parametrize(
    ("source", "prefixes"),
    [("v2_0", ("vpm.", "resampler.")), ("v4_5", ("vpm.", "resampler.")),
     ("omnilmm", ("model.vision_tower.", "model.resampler."))],
)  # fmt: skip
def test_prefixes_that_are_read(source: str, prefixes: tuple[str, ...]) -> None:
    assert read_prefixes(opened(source).tensors) == prefixes


def test_other_families_read_everything() -> None:
    assert read_prefixes(["visual.conv1.weight", "token_embedding.weight", "llm.x"]) == ()
    assert read_prefixes(["llm.lm_head.weight", "model.norm.weight"]) == ()
