"""CLIP's config.json from Hugging Face: what it may state and what not, and what transformers never sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, Model, StoredTensorInfo
from vlm_export.models.clip.architecture import architecture_from_huggingface, architecture_from_openai
from vlm_export.models.clip.family import ClipFamily

Config = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_huggingface_clip: Callable[..., Any]) -> Checkpoint:
    folder = tmp_path_factory.mktemp("clip") / "model"
    make_huggingface_clip(folder)
    return open_checkpoint(str(folder))


class MemoryStore:
    def new(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape)


def stating(checkpoint: Checkpoint, path: str, value: object) -> Checkpoint:
    """The checkpoint whose config.json has `value` at `path`, such as "text_config.vocab_size"."""
    config: Config = json.loads(json.dumps(checkpoint.config))
    *sections, key = path.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return replace(checkpoint, config=config)


def build(checkpoint: Checkpoint) -> Model:
    return ClipFamily().build(checkpoint, MemoryStore())


def run_references(model: Model) -> None:
    for part in model.parts:
        inputs = part.examples({"batch": 2, "sequence": 5}, 0)
        expected = part.module(*(torch.from_numpy(array) for array in inputs.values())).numpy()
        (got,) = model.references[part.name]()(inputs).values()
        assert np.abs(got - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("projection_dim", 8),
        ("projection_dim", "x"),
        ("projection_dim", None),
        ("text_config.num_hidden_layers", 1_000_000_000),
        ("text_config.vocab_size", 40_000_000),
        ("text_config.vocab_size", -1),
        ("text_config.hidden_size", 64),
        ("text_config.intermediate_size", 47),
        ("text_config.max_position_embeddings", 77),
        ("vision_config.image_size", 32),
        ("vision_config.num_channels", 1),
        ("vision_config.patch_size", [8, 8]),
        ("text_config_dict", {"hidden_size": 64, "layer_norm_eps": 2e-5, "eos_token_id": 524}),
    ],
)
def test_a_size_that_the_tensors_contradict_is_refused(checkpoint: Checkpoint, path: str, value: object) -> None:
    with pytest.raises(InputError, match="contradicts the tensors") as caught:
        build(stating(checkpoint, path, value))
    assert "config.json" in caught.value.where
    assert "not " in caught.value.got


@pytest.mark.parametrize(
    ("paths", "value", "what"),
    [
        (("text_config.layer_norm_eps", "vision_config.layer_norm_eps"), "abc", "malformed"),
        (("text_config.layer_norm_eps", "vision_config.layer_norm_eps"), None, "malformed"),
        (("text_config.layer_norm_eps", "vision_config.layer_norm_eps"), -1, "malformed"),
        (("text_config.layer_norm_eps",), 1e-3, "disagree on layer_norm_eps"),
        (("text_config.hidden_act", "vision_config.hidden_act"), ["gelu"], "activation"),
        (("text_config.eos_token_id",), 525, "outside the vocabulary"),
        (("text_config.eos_token_id",), 60_000, "outside the vocabulary"),
        (("text_config.eos_token_id",), [513], "a list of them"),
        (("vision_config_dict",), 5, "malformed"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    checkpoint: Checkpoint, paths: tuple[str, ...], value: object, what: str
) -> None:
    for path in paths:
        checkpoint = stating(checkpoint, path, value)
    with pytest.raises(InputError, match=what):
        build(checkpoint)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("return_dict", False),
        ("id2label", 5),
        ("logit_scale_init_value", "q"),
        ("vision_config.attention_dropout", "x"),
        ("text_config.initializer_range", "a"),
        ("text_config.model_type", "bert"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ],
)
def test_what_no_computation_reads_never_reaches_transformers(checkpoint: Checkpoint, path: str, value: object) -> None:
    run_references(build(stating(checkpoint, path, value)))


@pytest.mark.parametrize("end", [0, 1, 300])
def test_any_id_of_the_vocabulary_may_end_texts(checkpoint: Checkpoint, end: int) -> None:
    model = build(stating(checkpoint, "text_config.eos_token_id", end))
    assert model.architecture["text"]["end_token_id"] == end
    run_references(model)


def test_old_sections_replace_the_new_ones_as_in_transformers(checkpoint: Checkpoint) -> None:
    from transformers import CLIPConfig

    assert checkpoint.config is not None
    old = {"num_attention_heads": 4, "hidden_act": "gelu"}
    for section in ("text_config", "vision_config"):
        checkpoint = stating(checkpoint, f"{section}_dict", old)
    # A shortened one leaves the rest to the defaults.
    assert checkpoint.config is not None
    theirs = CLIPConfig.from_dict(json.loads(json.dumps(checkpoint.config)))
    ours = architecture_from_huggingface(_of_size(checkpoint, 49408))
    assert ours.towers[1].heads == theirs.text_config.num_attention_heads
    assert ours.activation == theirs.text_config.hidden_act
    assert ours.towers[0].heads == theirs.vision_config.num_attention_heads == 4
    assert ours.eps == theirs.text_config.layer_norm_eps == theirs.vision_config.layer_norm_eps
    assert ours.towers[1].end_token_id == theirs.text_config.eos_token_id
    unused = replace(checkpoint, config={**checkpoint.config, "text_config_dict": None, "vision_config_dict": None})
    assert architecture_from_huggingface(unused).towers[1].heads == 2


def test_defaults_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    from transformers import CLIPConfig

    theirs = CLIPConfig()
    changed = _of_size(replace(checkpoint, config={}), 49408)
    wide = {"vision_model.embeddings.patch_embedding.weight": (96, 3, 8, 8)}
    infos = {**changed.tensors, **{key: StoredTensorInfo(shape, "float32") for key, shape in wide.items()}}
    ours = architecture_from_huggingface(replace(changed, tensors=infos))
    assert (ours.towers[0].heads, ours.towers[1].heads) == (
        theirs.vision_config.num_attention_heads,
        theirs.text_config.num_attention_heads,
    )
    assert (ours.activation, ours.eps) == (theirs.text_config.hidden_act, theirs.text_config.layer_norm_eps)
    assert ours.towers[1].end_token_id == theirs.text_config.eos_token_id


def _of_size(checkpoint: Checkpoint, vocab_size: int) -> Checkpoint:
    key = "text_model.embeddings.token_embedding.weight"
    return replace(checkpoint, tensors={**checkpoint.tensors, key: StoredTensorInfo((vocab_size, 32), "float32")})


@pytest.mark.parametrize(("key", "rows", "what"), [("text", 4097, "too long"), ("vision", 1, "no row for a patch")])
def test_position_tables_that_no_graph_fits_are_refused(checkpoint: Checkpoint, key: str, rows: int, what: str) -> None:
    name, width = f"{key}_model.embeddings.position_embedding.weight", {"text": 32, "vision": 64}[key]
    infos = {**checkpoint.tensors, name: StoredTensorInfo((rows, width), "float32")}
    config = stating(checkpoint, "text_config.max_position_embeddings", rows if key == "text" else 20).config
    with pytest.raises(InputError, match=what):
        architecture_from_huggingface(replace(checkpoint, tensors=infos, config=config))


def test_openais_files_need_a_patch_too() -> None:
    shapes = {"visual.proj": (64, 8), "token_embedding.weight": (9, 64), "ln_final.weight": (64,)}
    shapes |= {"visual.conv1.weight": (64, 3, 8, 8), "visual.positional_embedding": (1, 64)}
    shapes |= {"visual.transformer.resblocks.0.mlp.c_fc.weight": (8, 64)}
    infos = {key: StoredTensorInfo(shape, "float32") for key, shape in shapes.items()}
    with pytest.raises(InputError, match="no row for a patch") as caught:
        architecture_from_openai(Checkpoint("x", "state_dict", (), infos, lambda key: torch.empty(0)))
    assert "visual.positional_embedding" in caught.value.where
