"""Strings in, numbers out: a bundle against the processor and the model that transformers reads from the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)

import vlm_export
from vlm_export import load
from vlm_export.exporting.pipeline import ExportResult
from vlm_export.specs.tasks import MatchSpec

Export = Callable[..., ExportResult]
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'<>&;#/|", "cat", "dog", "photo"]
BPE = {token: i for i, token in enumerate([*WORDS[:-3], *(f"{w}</w>" for w in WORDS[:-3]), "ca", "cat</w>"])}
MERGES = [("c", "a"), ("ca", "t</w>")]
START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = ["", "a cat", "A CAT, <sks>!", "zurgle cat", f"a dog {END} b", "a photo of a cat " * 3]


def bert(folder: Path, **named: str) -> BertTokenizer:
    """A vocabulary whose special tokens stand behind the words."""
    tokens = ["##s", *WORDS, "Cat", "<sep>", "<unk>", "<mask>", "<cls>", "<pad>"]
    named = {f"{name}_token": f"<{name}>" for name in ("unk", "sep", "pad", "cls", "mask")}
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=False, model_max_length=20, **named)
    tokenizer.save_pretrained(folder)
    return tokenizer


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_a_match_starts_with_the_tokenizer_s_own_token(tmp_path: Path, export_fast: Export) -> None:
    """The tokenizer is cased, and its [CLS] has another name and id than BERT's."""
    source = tmp_path / "source"
    tokenizer = bert(source)
    rows = len(tokenizer) + 2
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": rows, "max_position_embeddings": 24, "bos_token_id": rows - 2, "sep_token_id": rows - 1}
    config = BlipConfig(
        text_config={**sizes, **text, "pad_token_id": 0, "encoder_hidden_size": 32},
        vision_config={**sizes, "image_size": 24, "patch_size": 8},
        image_text_hidden_size=20,
    )
    model = randomised(BlipForImageTextRetrieval(config))
    model.save_pretrained(source)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 24, "width": 24}), tokenizer)
    processor.save_pretrained(source)
    export_fast(source, tmp_path / "bundle", with_tokenizer=True)

    # Of the model's own size, so that no filter is at stake.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    texts = ["a Cat", "a cat, a dog!", "photo"]
    inputs = processor(images=[image] * 3, text=texts, padding=True, return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.cls_token_id != 101
    with torch.inference_mode():
        wanted = model(**inputs).itm_score.softmax(dim=1)[:, 1].numpy()
    bundle = load(tmp_path / "bundle", threads=1)
    np.testing.assert_array_equal(bundle.session.tokenizer.encode(texts), inputs["input_ids"].numpy())
    found = np.array([pair.probability for pair in bundle.match(image, texts)])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert wanted.std() > 1e-3
    task = bundle.manifest.task(MatchSpec)
    assert task is not None
    assert (task.tokens.cls, task.tokens.pad) == (tokenizer.cls_token_id, tokenizer.pad_token_id)
    assert bundle.session.text_spec.case == "kept"


@pytest.mark.parametrize("end_token", ["its own", "legacy"])
def test_embeddings_of_texts_are_those_of_transformers(end_token: str, tmp_path: Path, export_fast: Export) -> None:
    source = tmp_path / "source"
    vocab = {**BPE, START: len(BPE), END: len(BPE) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=16)
    tokenizer.add_tokens(["zurgle", "<sks>"])
    tokenizer.save_pretrained(source)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": vocab[START], "eos_token_id": 2 if end_token == "legacy" else vocab[END]}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    model = randomised(CLIPModel(config))
    model.save_pretrained(source)
    export_fast(source, tmp_path / "bundle", with_tokenizer=True, parts=("text",))

    bundle = vlm_export.load(tmp_path / "bundle", threads=1)
    assert json.loads((tmp_path / "bundle" / "vlm_export.json").read_text())["text"]["context_length"] == 16
    found = bundle.encode_text(TEXTS, truncate=True)
    original = AutoTokenizer.from_pretrained(source)
    for padding in (True, "max_length"):
        inputs = original(TEXTS, padding=padding, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            features = model.get_text_features(**inputs)
        wanted = getattr(features, "pooler_output", features).numpy()
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=str(padding))
    assert np.abs(found[1] - found[2]).max() > 1e-2
