"""A nanoVLM bundle holds what transformers.js 4.3.1 reads of a vision-language model, under the names that it reads.

Paths and functions are those of its package's `src` folder; `generate` itself runs on Node.js only, not here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, ValueInfoProto

VARIANTS = ("222m", "450m", "split")
# `models/session_config.js`, MODEL_SESSION_CONFIG of ImageTextToText; fp32 has no suffix (`utils/dtypes.js`).
SESSIONS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
# `models/modeling_utils.js`, `generic_text_to_text_forward`, and `setNumLogitsToKeep`, which counts as our graphs do:
# what it hands to the decoder besides the cache.
DECODER_FEEDS = {"inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep"}

# `configs.js`, `getNormalizedConfig`: "llava" takes these from `text_config`, whose own type must be one that it maps.
# Each equals a size in the published config.json.
TEXT_SIZES = {
    "num_key_value_heads": "lm_n_kv_heads",
    "num_hidden_layers": "lm_n_blocks",
    "hidden_size": "lm_hidden_dim",
    "num_attention_heads": "lm_n_heads",
}

Bundle = Callable[[str], Path]


def config_of(bundle: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    return config


def load(bundle: Path, session: str) -> ModelProto:
    return onnx.load(bundle / "onnx" / f"{session}.onnx")


def shape_of(value: ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_selects_the_class_and_the_sizes(nanovlm_bundle: Bundle, variant: str) -> None:
    config = config_of(nanovlm_bundle(variant))
    # `models/registry.js`, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES; `resolveTypeConfig` compares the class's name.
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    # With it, `generate` would look for an encoder's states.
    assert not config.get("is_encoder_decoder")
    sizes = config["text_config"]
    assert sizes["model_type"] == "llama"
    assert {name: sizes[name] for name in TEXT_SIZES} == {name: config[own] for name, own in TEXT_SIZES.items()}
    assert sizes["head_dim"] * config["lm_n_heads"] == config["lm_hidden_dim"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_stops_at_the_tokenizers_end(nanovlm_bundle: Bundle, variant: str) -> None:
    bundle = nanovlm_bundle(variant)
    # `PreTrainedModel._prepare_generation_config`: the config's own keys, then those of `text_config` over them.
    config = config_of(bundle)
    merged = config | config["text_config"]
    # `models/auto/tokenization_auto.js`: both files, and a class that is its own without "Fast".
    settings = json.loads((bundle / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert merged["eos_token_id"] == ids[settings["eos_token"]]
    assert merged["pad_token_id"] == ids[settings["pad_token"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_places_of_images_are_named(nanovlm_bundle: Bundle, variant: str) -> None:
    bundle = nanovlm_bundle(variant)
    config = config_of(bundle)
    if variant == "222m":
        # Its features stand before the text: a host has to name a token of its own choice.
        assert not {"image_token_index", "image_token_id"} & set(config)
        return
    # `models/llava/modeling_llava.js`, `_merge_input_ids_with_image_features`.
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert config["image_token_index"] == config["image_token_id"] == ids[config["vlm_extra_tokens"]["image_token"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_take_and_give_the_names(nanovlm_bundle: Bundle, variant: str) -> None:
    bundle = nanovlm_bundle(variant)
    layers = config_of(bundle)["text_config"]["num_hidden_layers"]
    vision, embedding, decoder = (load(bundle, session) for session in SESSIONS)
    names = [([i.name for i in g.graph.input], [o.name for o in g.graph.output]) for g in (vision, embedding, decoder)]
    # `PreTrainedModel.encode_image` and `encode_text`.
    assert names[0] == (["pixel_values"], ["image_features"])
    assert names[1] == (["input_ids"], ["inputs_embeds"])
    # `configs.js`, `getKeyValueNames`; `session.js`, `validateInputs` refuses inputs that nobody feeds.
    cache = {f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")}
    assert set(names[2][0]) == DECODER_FEEDS | cache
    # `models/modeling_utils.js`, `getPastKeyValues`: a step's outputs are the next step's inputs.
    renamed = {name.replace("present", "past_key_values") for name in names[2][1] if name.startswith("present")}
    assert renamed == cache
    assert "logits" in names[2][1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_starts_empty_with_the_prompts_rows(nanovlm_bundle: Bundle, variant: str) -> None:
    bundle = nanovlm_bundle(variant)
    sizes = config_of(bundle)["text_config"]
    decoder = load(bundle, "decoder_model_merged")
    shapes = [shape_of(value) for value in decoder.graph.input if value.name.startswith("past_key_values.")]
    # `models/modeling_utils.js`, `addPastKeyValues`: an axis of this name is the batch, one of any other name is 0.
    resolved = {tuple({"batch_size": 2}.get(d, 0) if isinstance(d, str) else d for d in shape) for shape in shapes}
    assert resolved == {(2, sizes["num_key_value_heads"], 0, sizes["head_dim"])}


@pytest.mark.parametrize("variant", ["222m", "450m"])
def test_images_have_a_processor(nanovlm_bundle: Bundle, variant: str) -> None:
    path = nanovlm_bundle(variant) / "preprocessor_config.json"
    # `models/image_processors.js` lists no BLIP one, and `AutoProcessor` refuses a name that is not listed.
    assert json.loads(path.read_text(encoding="utf-8"))["image_processor_type"] == "SiglipImageProcessor"
