"""AltCLIP as transformers saves it: XLM-R's positions, and a norm and a layer before the text's projection."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AltCLIPConfig, AltCLIPModel, AltCLIPProcessor, CLIPImageProcessorPil

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.models.registry import load_family

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def config_of(rows: int) -> Any:
    # Positions begin behind the row of the padding, whose id is 1: texts have at most 96 tokens.
    text = {**SIZES, "vocab_size": rows, "max_position_embeddings": 98, "project_dim": 48, "pad_token_id": 1}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    return AltCLIPConfig(projection_dim=32, text_config=text, vision_config=vision)


@pytest.mark.parametrize("options", duals.BACK_ENDS, ids=" ".join)
def test_both_encoders(options: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = duals.unigram_tokenizer()
    source = tmp_path / "altclip"
    torch.manual_seed(0)
    model = duals.spread(AltCLIPModel(config_of(len(tokenizer))))
    model.save_pretrained(source)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    AltCLIPProcessor(processor, tokenizer).save_pretrained(source)
    bundle = duals.export(source, tmp_path / "out", *options)
    assert bundle.manifest.family == "altclip"
    assert bundle.manifest.text.context_length == 96
    duals.assert_pair_equal(source, bundle, model, edge=32, length=96)


@pytest.mark.parametrize("name", [name for name in known_names() if load_known(name).family == "altclip"])
def test_published_keys(name: str) -> None:
    known, family = load_known(name), load_family("altclip")
    stated = family.published_config(known.architecture)
    assert stated is not None
    with torch.device("meta"):
        expected = AltCLIPModel(AltCLIPConfig.from_dict(stated)).state_dict()
    # transformers 5 reads and writes "layer", and has "layers" in memory (conversion_mapping.py).
    shapes = {
        key.replace("encoder.layers.", "encoder.layer.") if "roberta" in key else key: tuple(tensor.shape)
        for key, tensor in expected.items()
    }
    assert {key: info.shape for key, info in family.published_tensors(known.architecture).items()} == shapes
