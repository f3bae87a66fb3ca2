"""Which model a checkpoint is: other models are refused under their own names, by config.json and by key names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.models.recognition.foreign import distinct_model, other_model
from vlm_export.models.registry import identify, load_family, recognise

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 16}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
TOWERS = {"text_config": TEXT, "vision_config": VISION}
OPT = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, **TEXT}
QFORMER = {**SIZES, "vocab_size": 64, "encoder_hidden_size": 32}
BLIP2 = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 4}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 2}
MIT = {f"mit_{key}": value for key, value in SIZES.items()}
GROUPS = {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2]}
# Class of transformers → its configuration beyond two ordinary towers, and what its key names alone are called.
OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "CLIPSegForImageSegmentation": (
        {"projection_dim": 16, "extract_layers": [0], "reduce_dim": 16, "decoder_num_attention_heads": 2},
        "CLIPSeg",
    ),
    "OwlViTForObjectDetection": ({"projection_dim": 16}, "OWL-ViT"),
    "Owlv2ForObjectDetection": ({"projection_dim": 16}, "OWLv2"),
    "GroupViTModel": ({"projection_dim": 16, "vision_config": {**VISION, **GROUPS}}, "GroupViT"),
    "XCLIPModel": (
        {"projection_dim": 32, "vision_config": {**VISION, **MIT}, "prompt_layers": 1, "prompt_num_attention_heads": 2},
        "X-CLIP",
    ),
    "AlignModel": (
        {"projection_dim": 16, "vision_config": {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1}},
        "ALIGN",
    ),
    "Blip2ForConditionalGeneration": (BLIP2, "BLIP-2"),
    "InstructBlipForConditionalGeneration": (BLIP2, "InstructBLIP"),
    "LlavaForConditionalGeneration": (
        {"vision_config": {**VISION, "model_type": "clip_vision_model"}, "text_config": LLAMA},
        "LLaVA",
    ),
    "BlipModel": ({"projection_dim": 16}, "BlipModel"),
    "CLIPForImageClassification": ({"projection_dim": 16}, "without its projection"),
    "VisionTextDualEncoderModel": (
        {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": {**SIZES, "vocab_size": 64, "model_type": "bert"},
        },
        "a dual encoder of two other models",
    ),
    "OwlViTModel": ({"projection_dim": 16}, "OWL-ViT or OWLv2"),
    "Aimv2Model": ({"projection_dim": 16}, "a model of images and texts that is not known here"),
    "BlipVisionModel": (VISION, "BLIP's image encoder alone"),
    "GitForCausalLM": ({**SIZES, "vocab_size": 64, "vision_config": VISION}, "GIT"),
    "ViltModel": ({**VISION, "vocab_size": 64}, "ViLT"),
}


def unread(key: str) -> torch.Tensor:
    raise AssertionError(key)


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        recognise(open_checkpoint(str(path)))
    assert caught.value.exit_status == 3
    return caught.value


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_transformers(tmp_path: Path, name: str) -> None:
    stated, title = OTHERS[name]
    cls = getattr(transformers, name)
    towers = {name: value for name, value in TOWERS.items() if name in cls.config_class.sub_configs}
    config = cls.config_class(**{**towers, **stated})
    cls(config).save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert error.what.startswith(f"config.json says {config.model_type} ({name})")
    assert "CLIPModel" in error.expected
    assert "BlipForQuestionAnswering" in error.expected
    if title:
        (tmp_path / "config.json").unlink()
        assert title in refusal(tmp_path).what


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",), "LoRA"),
        (("visual.conv1.weight", "token_embedding.weight", "text_decoder.resblocks.0.ln_1.weight"), "CoCa"),
        (("blocks.3.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"), "vision transformer of timm"),
        (("model.layers.11.self_attn.q_proj.weight", "model.embed_tokens.weight"), "a language model"),
        (("bert.embeddings.word_embeddings.weight",), "BERT"),
        (("layer1.0.conv1.weight", "fc.weight"), "ResNet"),
        (("visual.conv1.weight", "visual.proj"), "image encoder of CLIP alone"),
        (("a", "b"), "no family recognises"),
    ],
)
def test_key_names_without_a_config(keys: tuple[str, ...], name: str) -> None:
    checkpoint = Checkpoint("x.pt", "state_dict", (), dict.fromkeys(keys, StoredTensorInfo((1,), "float32")), unread)
    with pytest.raises(InputError, match=name):
        recognise(checkpoint)


@pytest.mark.parametrize(
    "keys",
    [
        ("visual.trunk.blocks.0.norm1.weight", "text.token_embedding.weight"),
        ("visual.conv1.weight", "text.transformer.embeddings.word_embeddings.weight"),
        ("visual.conv1.weight", "text.token_embedding.weight", "text.text_projection.weight"),
    ],
    ids=["timm", "transformers", "a bias"],
)
def test_forms_of_open_clip_need_its_config(tmp_path: Path, keys: tuple[str, ...]) -> None:
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "open_clip_pytorch_model.bin")
    family = recognise(open_checkpoint(str(tmp_path)))
    assert family.name == "openclip"
    with pytest.raises(InputError, match="nothing says which model of open_clip"):
        family.describe(open_checkpoint(str(tmp_path)))


def test_no_published_checkpoint_is_another_model() -> None:
    for known in map(load_known, known_names()):
        family = load_family(known.family)
        tensors = family.published_tensors(known.architecture)
        assert distinct_model(tensors) is None, known.name
        checkpoint = Checkpoint(known.name, "random", (), tensors, unread, family.published_config(known.architecture))
        found, seen = identify(checkpoint)
        assert (found.name, list(seen.tensors), seen.left_out, seen.notes) == (family.name, list(tensors), (), ())


def test_a_config_of_another_family(tmp_path: Path, make_huggingface_clip: Callable[..., Any]) -> None:
    make_huggingface_clip(tmp_path / "clip")
    checkpoint = open_checkpoint(str(tmp_path / "clip"))
    assert checkpoint.config is not None
    for changed, text in (
        ({"model_type": "blip", "architectures": None}, "say different models"),
        ({"model_type": "clip", "architectures": ["MyClip"]}, "config.json says clip (MyClip)"),
        ({"model_type": None, "architectures": ["Other"]}, "config.json says Other"),
        ({"model_type": "new_model"}, "config.json says new_model (CLIPModel): this model is not supported"),
        ({"model_type": "jina_clip_text"}, "the text encoder of Jina CLIP alone is not supported"),
        ({"model_type": 5}, "malformed"),
        ({"architectures": "CLIPModel"}, "malformed"),
    ):
        with pytest.raises(InputError) as caught:
            recognise(replace(checkpoint, config={**checkpoint.config, **changed}))
        assert text in caught.value.what
    for unstated in ({"architectures": None}, {"model_type": None, "architectures": None}):
        assert recognise(replace(checkpoint, config={**checkpoint.config, **unstated})).name == "clip"


@pytest.mark.parametrize(
    ("model_type", "name", "what", "way_out"),
    [
        ("clip_vision_model", "CLIPVisionModel", "image encoder without its projection", "CLIPVisionModelWithProj"),
        ("clip_text_model", "CLIPTextModel", "text encoder without its projection", "CLIPTextModelWithProjection"),
        ("clip", "CLIPForImageClassification", "classifier", "CLIPModel"),
        ("clip", "MyRetrieval", "this class", "with that one's config.json"),
        ("blip", "BlipModel", "BLIP without its heads", "one of the classes with a head"),
        ("metaclip_2_vision_model", "MetaClip2VisionModel", "MetaCLIP 2's image encoder", "MetaClip2VisionModelWithP"),
    ],
)
def test_a_class_that_is_not_exported_has_its_own_way_out(model_type: str, name: str, what: str, way_out: str) -> None:
    config = {"model_type": model_type, "architectures": [name]}
    with pytest.raises(InputError) as caught:
        recognise(Checkpoint("x", "safetensors", (), {}, unread, config))
    assert what in caught.value.what
    assert way_out in caught.value.fix


def test_a_config_of_one_tower_beside_weights_of_both(
    tmp_path: Path, make_huggingface_clip: Callable[..., Any]
) -> None:
    make_huggingface_clip(tmp_path / "clip")
    checkpoint = open_checkpoint(str(tmp_path / "clip"))
    assert checkpoint.config is not None
    config = {**checkpoint.config["vision_config"], "model_type": "clip_vision_model", "architectures": None}
    family, seen = identify(replace(checkpoint, config=config))
    with pytest.raises(InputError, match="different encoders of CLIP") as caught:
        family.describe(seen)
    assert caught.value.expected.startswith("that of the vision and the text encoder")


def test_families_are_no_others() -> None:
    assert other_model(["vpm.pos_embed", "resampler.query"]) is None
