"""The benchmark of captions runs both sides on equal weights, and both give the same ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.caption import Contest, model_from_checkpoint, report_from_results
from benchmarks.report import write_report

from vlm_export import load
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.models.blip.architecture import BlipArchitecture
from vlm_export.models.blip.family import BlipFamily


def tiny_architecture() -> BlipArchitecture:
    """The benchmark's own config with small sizes."""
    whole = BlipArchitecture.from_config(load_known("blip-image-captioning-base-hf").architecture)
    assert whole.decoder is not None
    sizes = {"width": 64, "layers": 2, "heads": 4, "hidden": 96}
    return replace(
        whole,
        vision=replace(whole.vision, **sizes, image_size=32),
        decoder=replace(whole.decoder, **sizes, vocab_size=160, positions=24, states_width=64),
        tokens=replace(whole.tokens, decoder_start=158, encoder_start=159),
    )


@pytest.fixture(scope="module")
def huggingface_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    family, architecture = BlipFamily(), tiny_architecture().to_json()
    random_checkpoint("tiny", family.published_tensors(architecture), 0, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.published_config(architecture)))
    return folder


@pytest.mark.parametrize("beams", [1, 3])
def test_both_sides_give_the_same_ids(beams: int, huggingface_directory: Path, tmp_path: Path) -> None:
    options = ExportOptions(opset=17, with_tokenizer=False, threads=1)
    export_bundle(str(huggingface_directory), tmp_path / "bundle", options)
    original = model_from_checkpoint(open_checkpoint(str(huggingface_directory)))
    contest = Contest(load(tmp_path / "bundle", threads=1), original)
    result: dict[str, Any] = contest.measure(2, beams, 2)
    assert result["ids_equal"]
    assert (result["tokens"], len(result["seconds"])) == (2 * 16, 2)
    assert min(result["tokens_per_s"], result["original_tokens_per_s"], result["ratio"]) > 0
    page = write_report(report_from_results("tiny", [result], 2, 1), tmp_path, "caption", "measure")
    assert "batch 2, " in page
