"""LoRA adapters that peft wrote, against peft's own merge: weights, refusals, and embeddings end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval, CLIPConfig, CLIPModel

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError, UsageError, VlmExportError
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.models.registry import identify

TOLERANCE = 1e-5
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {
        "vocab_size": 600,
        "max_position_embeddings": 77,
        "bos_token_id": 598,
        "eos_token_id": 599,
        "pad_token_id": 599,
    }
    config = CLIPConfig(
        projection_dim=32,
        text_config={**text, **_SIZES},
        vision_config=dict(image_size=32, patch_size=16, **_SIZES),
    )
    return CLIPModel(config).eval()


def tiny_blip() -> BlipForImageTextRetrieval:
    torch.manual_seed(0)
    text = {
        **_SIZES,
        **{"vocab_size": 300, "encoder_hidden_size": 64, "max_position_embeddings": 64},
        **{"bos_token_id": 298, "eos_token_id": 102, "sep_token_id": 102, "pad_token_id": 0},
    }
    config = BlipConfig(
        projection_dim=32,
        image_text_hidden_size=32,
        text_config=text,
        vision_config=dict(image_size=32, patch_size=16, **_SIZES),
    )
    return BlipForImageTextRetrieval(config).eval()


def save_adapter(folder: Path, model: nn.Module, **settings: Any) -> nn.Module:
    """Writes `base` and `adapter` with random matrices into the folder; returns peft's own merged model."""
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                start = 1.0 if "magnitude" in name else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(start * parameter + 0.1 * noise)
    adapted.save_pretrained(folder / "adapter")
    merged: nn.Module = adapted.merge_and_unload()
    return merged


CASES: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["fc1", "fc2"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"vision_model.encoder.layers.0.self_attn.v_proj": 3},
    },
    "embeddings": {"r": 4, "target_modules": ["token_embedding", "position_embedding", "q_proj"]},
    "convolution": {"r": 4, "target_modules": ["patch_embedding", "out_proj"]},
    "biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "bias of B": {"r": 4, "target_modules": ["q_proj"], "lora_bias": True},
    "weight decomposition": {"r": 4, "target_modules": ["q_proj", "fc2"], "use_dora": True},
    "whole modules beside": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["visual_projection"]},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_weights_are_what_peft_merges(settings: dict[str, Any], tmp_path: Path) -> None:
    merged = save_adapter(tmp_path, tiny_clip(), **settings).state_dict()
    base = open_checkpoint(str(tmp_path / "base"))
    checkpoint = open_checkpoint(str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    assert set(checkpoint.tensors) == set(base.tensors)
    named = open_checkpoint(str(tmp_path / "adapter" / "adapter_model.safetensors"), base=str(tmp_path / "base"))
    assert named.computed == checkpoint.computed
    changed = 0
    for key in checkpoint.tensors:
        got, expected = checkpoint.read(key), merged[key]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        assert checkpoint.tensors[key].shape == tuple(got.shape)
        changed += not torch.equal(got, base.read(key))
    assert changed, "the adapter changes nothing, so nothing is shown"


def test_a_base_with_prefixed_keys(tmp_path: Path) -> None:
    merged = save_adapter(tmp_path, tiny_clip(), **CASES["attention"]).state_dict()
    weights = CLIPModel.from_pretrained(tmp_path / "base").state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "base" / "run.pt")
    (tmp_path / "base" / "model.safetensors").unlink()
    opened = open_checkpoint(str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    _, checkpoint = identify(opened)
    key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(checkpoint.read(key), merged[key], atol=1e-6, rtol=1e-6)
    assert key in checkpoint.computed
    assert any("LoRA" in note for note in checkpoint.notes)


def clip_features(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=inputs["pixel_values"])  # type: ignore[operator]
        text = model.get_text_features(input_ids=inputs["input_ids"])  # type: ignore[operator]
    return {"image_embeds": image.pooler_output, "text_embeds": text.pooler_output}


def blip_features(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        hidden = model.vision_model(inputs["pixel_values"])[0]  # type: ignore[operator]
        image = model.vision_proj(hidden[:, 0])  # type: ignore[operator]
        text = model.text_encoder(  # type: ignore[operator]
            inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"])
        )[0]
        text = model.text_proj(text[:, 0])  # type: ignore[operator]
    return {"image_embeds": nn.functional.normalize(image), "text_embeds": nn.functional.normalize(text)}


@pytest.mark.parametrize(
    ("build", "features", "targets"),
    [
        (tiny_clip, clip_features, ["q_proj", "v_proj", "fc1"]),
        (tiny_blip, blip_features, ["qkv", "query", "value", "dense"]),
    ],
    ids=["clip", "blip"],
)
def test_embeddings_of_the_bundle_are_those_of_peft(
    build: Callable[[], nn.Module],
    features: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]],
    targets: list[str],
    tmp_path: Path,
) -> None:
    import vlm_export

    merged = save_adapter(tmp_path, build(), r=4, lora_alpha=8, target_modules=targets)
    options = ExportOptions(opset=17, threads=1, base=str(tmp_path / "base"), with_tokenizer=False)
    manifest = export_bundle(str(tmp_path / "adapter"), tmp_path / "out", options).manifest
    names = [file.name for file in manifest.source.files]
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(names)

    generator = torch.Generator().manual_seed(2)
    inputs = {
        "pixel_values": torch.randn((3, 3, 32, 32), generator=generator),
        "input_ids": torch.randint(1, 290, (3, 9), generator=generator),
    }
    inputs["input_ids"][:, -1] = 599 if build is tiny_clip else 102
    expected = features(merged, inputs)
    bundle = vlm_export.load(tmp_path / "out")
    got_text = bundle.encode_ids(inputs["input_ids"].numpy())
    np.testing.assert_allclose(got_text, nn.functional.normalize(expected["text_embeds"]), atol=TOLERANCE, rtol=0)
    pixels = {"pixel_values": inputs["pixel_values"].numpy()}
    got_image = torch.from_numpy(np.asarray(run_vision(tmp_path / "out", pixels)))
    assert (
        nn.functional.normalize(got_image) - nn.functional.normalize(expected["image_embeds"])
    ).abs().max() <= TOLERANCE


def run_vision(bundle: Path, inputs: dict[str, Any]) -> Any:
    import onnxruntime as ort

    session = ort.InferenceSession(bundle / "onnx" / "vision_model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["image_embeds"], inputs)[0]


def refused(folder: Path, **options: Any) -> VlmExportError:
    with pytest.raises(VlmExportError) as caught:
        open_checkpoint(str(folder), **options)
    return caught.value


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(tmp_path, tiny_clip(), **CASES["attention"])
    adapter, base = tmp_path / "adapter", str(tmp_path / "base")

    edit_config(tmp_path, base_model_name_or_path="/nowhere/clip")
    error = refused(adapter)
    assert "/nowhere/clip" in str(error.where)
    assert "--base" in str(error.fix)
    edit_config(tmp_path, base_model_name_or_path=None)
    assert isinstance(refused(adapter), UsageError)

    assert "--base" in str(refused(Path(base), base=base))

    edit_config(tmp_path, r=8)
    assert "rank 8" in str(refused(adapter, base=base))
    edit_config(tmp_path, r=4, trainable_token_indices=[1])
    assert "trainable_token_indices" in str(refused(adapter, base=base))
    edit_config(tmp_path, trainable_token_indices=None, peft_type="IA3")
    assert "IA3" in str(refused(adapter, base=base))
    edit_config(tmp_path, peft_type="LORA")
    (adapter / "adapter_model.safetensors").unlink()
    assert isinstance(error := refused(adapter, base=base), InputError)
    assert "adapter_model" in str(error.expected)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, tiny_clip(), **CASES["attention"])
    tiny_blip().save_pretrained(tmp_path / "other")
    error = refused(tmp_path / "adapter", base=str(tmp_path / "other"))
    lines = str(error).splitlines()
    assert any(line.startswith("    the base has no layer") for line in lines), lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "no magnitude vector"),
        ({"target_modules": ["no_such_module"]}, "the settings put no adapter there"),
        ({"exclude_modules": ["v_proj"]}, "the settings put no adapter there"),
        ({"layers_to_transform": [50]}, "the settings put no adapter there"),
    ],
)
def test_settings_and_tensors_that_contradict_each_other(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """peft leaves such tensors aside, or computes another method than the one that they were trained with."""
    save_adapter(tmp_path, tiny_clip(), r=2, target_modules=["q_proj", "v_proj"])
    edit_config(tmp_path, **change)
    error = refused(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert said in str(error)
