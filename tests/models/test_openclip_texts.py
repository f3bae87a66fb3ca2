"""Bundles of open_clip's models with a tokenizer: ids and embeddings of sixty texts, as open_clip's own gives them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
forms = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("open_clip_forms.py"))))
Config = dict[str, Any]
OWN_TOKENIZER: dict[str, Config] = {
    "end of text": {},
    "last of all tokens": {
        "text_cfg": forms.text(no_causal_mask=True, pool_type="last", proj_bias=True),
        "init_logit_bias": -10,
        "init_logit_scale": 2.0,
    },
}


def assert_ids_equal(bundle: Any, tokenize: Any) -> None:
    """Those of sixty texts of many scripts, which open_clip fills up."""
    expected = tokenize(list(duals.TEXTS)).tolist()
    got, _ = bundle.session.tokenizer.pad_masked(
        bundle.session.tokenizer.encode_rows(duals.TEXTS, truncate=True), pad_to=len(expected[0])
    )
    assert got.tolist() == expected


@pytest.mark.parametrize("form", OWN_TOKENIZER)
def test_texts_with_the_tokenizer_of_open_clip(form: str, tmp_path: Path) -> None:
    """That of its own models and of MobileCLIP."""
    import open_clip

    source = tmp_path / "model"
    original = forms.save(source, forms.config(**OWN_TOKENIZER[form]))
    bundle = duals.export(source, tmp_path / "out", "--opset", "17", model_type="open_clip")
    tokenize = open_clip.get_tokenizer(f"local-dir:{source}")
    assert_ids_equal(bundle, tokenize)
    with torch.inference_mode():
        expected = original.encode_text(tokenize(list(duals.TEXTS)))
    duals.assert_equal(bundle.encode_text(duals.TEXTS, truncate=True), expected, duals.TEXTS)


WITH_TOKENIZERS: dict[str, tuple[Config, Config, Config]] = {
    "sigmoid, canonical texts, longest edge": (
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}},
        {"init_logit_bias": -10, "init_logit_scale": 2.0},
        {"resize_mode": "longest", "fill_color": 99, "interpolation": "bilinear"},
    ),
    "end of text by id, texts as they are": ({"pool_type": "eos", "eos_id": 2, "pad_id": 1}, {}, {"mean": 0.5}),
    "encoder of transformers": ({"hf_model_name": "tiny"}, {}, {}),
    "first token, lower case": (
        {"no_causal_mask": True, "pool_type": "first", "tokenizer_kwargs": {"clean": "lower"}},
        {},
        {"resize_mode": "squash"},
    ),
}


@pytest.mark.parametrize("form", WITH_TOKENIZERS)
def test_images_and_texts_with_a_tokenizer_of_transformers(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    words, scores, preprocess = WITH_TOKENIZERS[form]
    tokenizer = duals.unigram_tokenizer(model_max_length=512)
    rows = forms.text(vocab_size=len(tokenizer), hf_tokenizer_name="nobody/nothing", **words)
    source, stated = tmp_path / "model", forms.config(preprocess, text_cfg=rows, **scores)
    original = forms.save_hf(source, "xlm-roberta", 1, len(tokenizer), stated, monkeypatch)
    tokenizer.save_pretrained(source)
    bundle = duals.export(source, tmp_path / "out", "--opset", "17", model_type="open_clip")
    samples = duals.images(24)
    transform: Any = image_transform_v2(PreprocessCfg(size=24, **preprocess), is_train=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{source}")
    assert_ids_equal(bundle, tokenize)
    with torch.inference_mode():
        images = original.encode_image(torch.stack([transform(image) for image in samples]))
        texts = original.encode_text(tokenize(list(duals.TEXTS)))
    duals.assert_equal(bundle.encode_image(samples), images, [f"{i.mode} {i.size}" for i in samples])
    for batch_size in (1, 7):
        got = bundle.encode_text(duals.TEXTS, truncate=True, batch_size=batch_size)
        duals.assert_equal(got, texts, duals.TEXTS)
