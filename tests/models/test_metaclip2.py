"""MetaCLIP 2 as transformers saves it: the end token has id 2, which in CLIP's own configs means something else."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2TextModelWithProjection,
    MetaClip2VisionModelWithProjection,
)

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.models.clip.metaclip2 import MetaClip2Family
from vlm_export.models.registry import load_family

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": 32, "width": 32}


def config_of(rows: int, activation: str = "quick_gelu", **vision: Any) -> Any:
    text = {**SIZES, "vocab_size": rows, "max_position_embeddings": 77, "hidden_act": activation}
    text |= {"bos_token_id": 0, "eos_token_id": 2}
    image = {**SIZES, "image_size": 32, "patch_size": 16, "hidden_act": activation, **vision}
    return MetaClip2Config(projection_dim=32, text_config=text, vision_config=image)


@pytest.mark.parametrize("options", duals.BACK_ENDS, ids=" ".join)
def test_both_encoders(options: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = duals.unigram_tokenizer(model_max_length=77)
    source = tmp_path / "metaclip"
    torch.manual_seed(0)
    model = duals.spread(MetaClip2Model(config_of(len(tokenizer), "gelu" if "dynamo" in options else "quick_gelu")))
    model.save_pretrained(source)
    CLIPProcessor(CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tokenizer).save_pretrained(source)
    bundle = duals.export(source, tmp_path / "out", *options)
    assert bundle.manifest.family == "metaclip2"
    assert bundle.manifest.text.pooling == "end_token"
    duals.assert_pair_equal(source, bundle, model, edge=32, length=77)


def test_towers(tmp_path: Path) -> None:
    tokenizer = duals.unigram_tokenizer(model_max_length=77)
    config = config_of(len(tokenizer))
    torch.manual_seed(0)
    text = duals.spread(MetaClip2TextModelWithProjection(config.text_config))
    vision = duals.spread(MetaClip2VisionModelWithProjection(config.vision_config))
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    vision.save_pretrained(tmp_path / "vision")
    CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE).save_pretrained(tmp_path / "vision")
    bundle = duals.export(tmp_path / "text", tmp_path / "texts", "--opset", "17")
    duals.assert_texts_equal(tmp_path / "text", bundle, lambda inputs: text(**inputs).text_embeds, 77)
    bundle = duals.export(tmp_path / "vision", tmp_path / "images", "--opset", "17")
    duals.assert_images_equal(tmp_path / "vision", bundle, lambda pixels: vision(pixels).image_embeds, 32)


@pytest.mark.parametrize("name", [name for name in known_names() if load_known(name).family == "metaclip2"])
def test_published_keys(name: str) -> None:
    known = load_known(name)
    family = load_family("metaclip2")
    assert isinstance(family, MetaClip2Family)
    config = MetaClip2Config.from_dict(json.loads(json.dumps(family.published_config(known.architecture))))
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in MetaClip2Model(config).state_dict().items()}
    assert {key: info.shape for key, info in family.published_tensors(known.architecture).items()} == expected
