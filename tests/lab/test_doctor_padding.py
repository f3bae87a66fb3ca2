"""A model that was trained on texts filled up to its context, without a mask: SigLIP of transformers, tiny."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor, SiglipTokenizer

import vlm_export
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.lab.consumer.report import Diagnosis

LENGTH = 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CORPUS = ["a photo of two cats on the mat", "the dog's cafe, 3.14", "a crowded market street in the early evening"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The bundle, and the original's tokenizer and model."""
    folder, pieces = tmp_path_factory.mktemp("siglip"), io.BytesIO()
    settings: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=pieces, vocab_size=60, hard_vocab_limit=False, **settings
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_size": 32, "eos_token_id": 1}
    config = SiglipConfig(text_config={**SIZES, **text}, vision_config={**SIZES, "image_size": 32, "patch_size": 16})
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    source, bundle = folder / "source", folder / "bundle"
    model.save_pretrained(source)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)
    SiglipProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(source)
    export_bundle(str(source), bundle, ExportOptions(opset=17, threads=1))
    return bundle, tokenizer, model


def answered(siglip: tuple[Path, Any, Any], *, with_ids: bool, **options: Any) -> Diagnosis:
    """What doctor says of transformers' own tokenizer, called with these options, and its model."""
    bundle, tokenizer, model = siglip
    record = json.loads((bundle / "golden" / "contract" / "record.json").read_text(encoding="utf-8"))
    ids, vectors = [], []
    for item in record["texts"]:
        row = tokenizer([item["text"]], truncation=True, max_length=LENGTH, return_tensors="pt", **options)["input_ids"]
        with torch.no_grad():
            found = model.get_text_features(input_ids=row)
        vectors.append(torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)[0].numpy())
        ids.append(row[0].tolist())
    return vlm_export.doctor(bundle, {"text_vectors": vectors, **({"ids": ids} if with_ids else {})})


@pytest.mark.parametrize("with_ids", [True, False])
def test_texts_that_are_filled_up_have_no_mistake(siglip: tuple[Path, Any, Any], with_ids: bool) -> None:
    found = answered(siglip, with_ids=with_ids, padding="max_length")
    assert found.passed, found


def test_texts_that_are_not_filled_up_are_named(siglip: tuple[Path, Any, Any]) -> None:
    """The graph has one length: it cannot tell what vectors such ids have."""
    found = answered(siglip, with_ids=True)
    assert [finding.mistake for stage in found.wrong for finding in stage.findings] == ["not padded"]
    assert found.stages[2].verdict == "not compared"
    (stage,) = answered(siglip, with_ids=False).wrong
    assert not stage.findings
