"""FG-CLIP 2 as its authors publish it: SigLIP 2's NaFlex for images and short texts, and heads that are left out."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Siglip2Config, Siglip2Model, Siglip2Processor

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.registry import load_family

duals, siglip, siglip2 = (
    SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(name))))
    for name in ("dual_encoders.py", "test_siglip.py", "test_siglip2.py")
)
LONG, WIDTH = 196, 64
EXTRAS = {
    "text_model.embeddings.position_embedding_ori.weight": (LONG, WIDTH),
    "text_model.embeddings.position_embedding_res.weight": (LONG, WIDTH),
    **{
        f"{head}.{kind}": (WIDTH, WIDTH)[: 2 - (kind == "bias")]
        for head in ("longtext_head", "boxtext_head")
        for kind in ("weight", "bias")
    },
    "dense_feature_head.probe": (1, 1, WIDTH),
    "dense_feature_head.layernorm.weight": (WIDTH,),
}


@pytest.fixture(scope="module")
def fgclip2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint in the authors' form, and the class of transformers that holds its images and short texts."""
    folder, texts = tmp_path_factory.mktemp("fgclip2"), siglip.gemma_tokenizer(Path())
    torch.manual_seed(0)
    model = duals.spread(Siglip2Model(siglip2.config_of(len(texts))))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.5)
    model.save_pretrained(folder)
    Siglip2Processor(siglip2.image_processor(), texts).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **{key: torch.randn(shape) for key, shape in EXTRAS.items()}}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "fgclip2", "architectures": ["Fgclip2Model"]}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_fgclip2.Fgclip2Model"}
    config["text_config"] |= {"model_type": "fgclip2_text_model", "keep_len": 20, "longtext_len": LONG}
    config["vision_config"]["model_type"] = "fgclip2_vision_model"
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_images_and_short_texts(fgclip2: tuple[Path, Any], tmp_path: Path) -> None:
    source, model = fgclip2
    bundle = duals.export(source, tmp_path / "out", "--opset", "17")
    manifest = bundle.manifest
    assert manifest.family == "fgclip2"
    assert set(manifest.source.dropped_keys) == set(EXTRAS)
    assert (manifest.text.case, manifest.text.context_length) == ("lower", 64)
    published = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert published(["A CAT"])["input_ids"] == bundle.session.tokenizer.encode_rows(["A CAT"])
    siglip2.assert_images_equal(source, bundle, lambda inputs: model.get_image_features(**inputs).pooler_output)
    encode = lambda inputs: model.text_model(inputs["input_ids"]).pooler_output  # noqa: E731
    texts = duals.assert_texts_equal(source, bundle, encode, 64, padding="max_length", first=str.lower)
    inputs = siglip2.image_processor()(images=siglip2.images(), return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs, input_ids=texts["input_ids"]).logits_per_image.sigmoid()
    got = bundle.classify(siglip2.images(), duals.TEXTS, template="{}", truncate=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=duals.MAX_ABS, rtol=0)


def test_its_config_with_weights_of_siglip2(
    fgclip2: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config that is not that of the weights is named."""
    source, model = fgclip2
    model.save_pretrained(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert duals.main(["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--opset", "17"]) == 3
    assert "config.json and the names of the tensors say different models" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in known_names() if load_known(name).family == "fgclip2"])
def test_published_keys(name: str) -> None:
    """Of what is exported; the random weights of a known checkpoint have nothing else."""
    known, family = load_known(name), load_family("fgclip2")
    stated = family.published_config(known.architecture)
    assert stated is not None
    assert stated["model_type"] == "fgclip2"
    with meta_modules():
        expected = Siglip2Model(Siglip2Config.from_dict({**stated, "model_type": "siglip2"})).state_dict()
    shapes = {key: info.shape for key, info in family.published_tensors(known.architecture).items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in expected.items()}
