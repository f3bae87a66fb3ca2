"""What is OmniLMM's alone; its records and manifest are in `test_minicpmv`."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.errors import UsageError
from vlm_export.family import BuildOptions, Model
from vlm_export.models.minicpmv.omnilmm import OmniLmmFamily
from vlm_export.specs import SliceSpec

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("minicpmv_oracle.py"))))


@pytest.fixture(scope="module")
def model(build_model: Callable[[Path], Model]) -> Model:
    return build_model(oracle.DATA / "omnilmm")


def test_what_the_checkpoint_says(model: Model) -> None:
    assert (model.family, model.architecture["version"]) == ("omnilmm", "omnilmm")
    assert model.architecture["vision"]["post_norm"]
    # The recorded checkpoint lacks the last of three blocks, which the original replaces.
    assert model.architecture["vision"]["layers"] == 2
    slicing = model.image
    assert isinstance(slicing, SliceSpec)
    assert (slicing.mode, slicing.size_pixels, slicing.max_slices) == ("square", 112, 1)
    assert "model.layers.0.self_attn.q_proj.weight" in model.dropped_keys
    assert not [key for key in model.dropped_keys if key.startswith(OmniLmmFamily.reads)]


def test_the_class_token_is_dropped(model: Model) -> None:
    tokens = oracle.part_of(model, "vision_tokens")
    inputs = tokens.examples({"batch": 2, "side": 42}, 0)
    assert oracle.run_module(tokens, inputs).shape == (2, 3, 3, 64)


@pytest.mark.parametrize("size", ["84", "112"])
def test_the_encoder_with_its_class_token(model: Model, size: str) -> None:
    encoder = oracle.part_of(model, "vision_tokens").module.get_submodule("vision")
    records = oracle.golden("omnilmm")
    with torch.inference_mode():
        found = encoder(torch.from_numpy(records[f"input.pixel_{size}"])).numpy()
    np.testing.assert_allclose(found, records[f"output.vision_tower_{size}"], atol=1e-5)


def test_keys_have_no_bias(model: Model) -> None:
    bias = oracle.part_of(model, "vision_tokens").module.get_parameter("vision.blocks.1.attn.qkv.bias")
    query, key, value = bias.detach().numpy().reshape(3, -1)
    assert np.abs(query).max() > 0 < np.abs(value).max()
    assert not key.any()


def test_a_config_is_not_needed() -> None:
    checkpoint = replace(open_checkpoint(str(oracle.DATA / "omnilmm")), config=None)
    assert OmniLmmFamily().describe(checkpoint).architecture["image_size"] == 448


def test_sizes_are_no_options() -> None:
    checkpoint = open_checkpoint(str(oracle.DATA / "omnilmm"))
    with pytest.raises(UsageError, match="any size already"):
        OmniLmmFamily().build(checkpoint, oracle.MetaStore(), BuildOptions(image_size=224))


def test_heads_that_nothing_states_are_said() -> None:
    checkpoint, family = open_checkpoint(str(oracle.DATA / "omnilmm")), OmniLmmFamily()
    (warning,) = family.describe(checkpoint).warnings
    assert "--set head_width=" in warning
    assert "2 heads" in warning
    assert family.build(checkpoint, oracle.MetaStore()).warnings == (warning,)
    told = family.build(checkpoint, oracle.MetaStore(), BuildOptions(family_options={"head_width": 16}))
    assert (told.architecture["vision"]["heads"], told.warnings) == (4, ())
    with pytest.raises(UsageError, match="not a multiple"):
        family.build(checkpoint, oracle.MetaStore(), BuildOptions(family_options={"head_width": 7}))


def test_heads_of_the_published_encoder_are_known() -> None:
    known = load_known("omnilmm-12b")
    family = OmniLmmFamily()
    tensors = family.published_tensors(known.architecture)
    checkpoint = replace(open_checkpoint(str(oracle.DATA / "omnilmm")), tensors=tensors, config=None)
    description = family.describe(checkpoint)
    assert (description.architecture["vision"]["heads"], description.warnings) == (16, ())
    with pytest.raises(UsageError, match="are known"):
        family.build(checkpoint, oracle.MetaStore(), BuildOptions(family_options={"head_width": 56}))
