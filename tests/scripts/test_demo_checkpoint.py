"""The committed demo checkpoint: it works, it is what its config and its report say, and its script runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_demo
from demo.accuracy import Accuracy, Embeddings, EncodeImage, EncodeText, evaluate
from demo.checkpoint import load_model, torch_encoders
from demo.files import IMAGED, DemoFiles, image_name, sha256_of
from demo.sentences import caption
from demo.tokens import load_tokenizer, token_rows, train_tokenizer
from demo.world import COMPOSITIONS
from PIL import Image
from tokenizers import Tokenizer as RustTokenizer

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.family import Model
from vlm_export.models.clip.family import ClipFamily
from vlm_export.runtime.inputs.texts import Tokenizer

FILES = DemoFiles(Path(__file__).resolve().parents[2] / "configs")
SENTENCES = ("two big red stars", "A photo of a Cat, 🐈 naïve", "", "  spaced   out ", "x" * 200)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return load_model(FILES.checkpoint)


@pytest.fixture(scope="module")
def encoders(model: Model) -> tuple[EncodeImage, EncodeText]:
    return torch_encoders(model, FILES.tokenizer)


@pytest.fixture(scope="module")
def measured(encoders: tuple[EncodeImage, EncodeText]) -> Accuracy:
    return evaluate(*encoders, each=2)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILES.report.read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="module")
def tokenizer() -> RustTokenizer:
    return load_tokenizer(FILES.tokenizer)


def test_held_out_compositions_are_recognised(measured: Accuracy) -> None:
    assert measured.candidates == len(COMPOSITIONS)
    assert measured.top1 >= 0.95
    assert min(measured.by_attribute.values()) >= 0.97
    assert measured.colour_and_shape >= 0.9


def test_report_is_about_this_file(report: dict[str, Any], measured: Accuracy) -> None:
    assert report["sha256"] == sha256_of(FILES.checkpoint)
    assert report["size_bytes"] == FILES.checkpoint.stat().st_size <= 8_000_000
    assert report["accuracy"]["top1"] >= 0.95
    # The report was measured on twice as many images.
    assert report["accuracy"]["top1"] == pytest.approx(measured.top1, abs=0.02)


def test_one_zeroed_matrix_ruins_the_metric(encoders: tuple[EncodeImage, EncodeText]) -> None:
    broken = load_model(FILES.checkpoint)
    vision = next(part.module for part in broken.parts if part.name == "vision")
    vision.get_parameter("blocks.1.mlp.fc2.weight").zero_()
    encode_image, _ = torch_encoders(broken, FILES.tokenizer)
    assert evaluate(encode_image, encoders[1], each=1).top1 < 0.8


def test_config_pins_this_file_and_its_architecture() -> None:
    known = load_known("clip-demo")
    checkpoint = open_checkpoint("clip-demo")
    assert known.sha256 == sha256_of(FILES.checkpoint) == checkpoint.files[0].sha256
    assert dict(known.architecture) == dict(ClipFamily().describe(checkpoint).architecture)
    assert checkpoint.side_files["tokenizer.json"].read_bytes() == FILES.tokenizer.read_bytes()


def test_keys_and_dtypes_are_as_openai_publishes_them() -> None:
    checkpoint = open_checkpoint(str(FILES.checkpoint))
    expected = ClipFamily().published_tensors(load_known("clip-demo").architecture)
    assert set(checkpoint.tensors) == set(expected)
    for key, info in checkpoint.tensors.items():
        assert info.shape == expected[key].shape
        kept = key.endswith(("embedding", "embedding.weight", "logit_scale")) or ".ln_" in key or "ln_final" in key
        assert info.dtype == ("float32" if kept else "float16"), key


def test_specs_of_config_and_model_agree(model: Model) -> None:
    known = load_known("clip-demo")
    assert known.image == model.image
    assert known.text == model.text


def test_tokenizer_takes_any_text_and_gives_it_back(tokenizer: RustTokenizer) -> None:
    for text in SENTENCES:
        encoding = tokenizer.encode(text)
        assert encoding.ids[0] == tokenizer.get_vocab_size() - 2
        assert encoding.ids[-1] == tokenizer.get_vocab_size() - 1 == tokenizer.token_to_id("<|endoftext|>")
        assert max(encoding.ids[1:-1], default=0) < tokenizer.get_vocab_size() - 2
        assert tokenizer.decode(encoding.ids).removeprefix(" ") == text.lower().removeprefix(" ")
    assert tokenizer.get_vocab_size() <= 512


def test_training_and_runtime_tokenize_alike(model: Model, tokenizer: RustTokenizer) -> None:
    assert model.text is not None
    texts = [caption(composition) for composition in COMPOSITIONS[::40]] + ["A Big Red Star", "3 tiny things below"]
    ids = token_rows(tokenizer, texts)
    assert np.array_equal(ids, Tokenizer(FILES.tokenizer, model.text).encode(texts))
    assert ids.shape[1] <= model.text.context_length


def test_tokenizer_training_is_deterministic(tokenizer: RustTokenizer) -> None:
    assert train_tokenizer(0).get_vocab() == tokenizer.get_vocab()


def test_images_are_held_out_and_recognised(encoders: tuple[EncodeImage, EncodeText]) -> None:
    paths = sorted(FILES.images.iterdir())
    captions = FILES.captions.read_text(encoding="utf-8").splitlines()
    assert [path.name for path in paths] == sorted(map(image_name, IMAGED))
    assert sorted(captions) == sorted(map(caption, IMAGED))
    assert all(composition.held_out for composition in IMAGED)
    sources = [Image.open(path) for path in paths]
    images, texts = encoders[0](sources), encoders[1](captions)
    assert nearest(images, texts) == list(range(len(paths)))


def test_quickstart_labels_name_the_first_image(encoders: tuple[EncodeImage, EncodeText]) -> None:
    first = sorted(FILES.images.iterdir())[0]
    labels = ["a red circle", "a blue circle", "a red square", "a blue square"]
    assert nearest(encoders[0]([Image.open(first)]), encoders[1](labels)) == [1]


def nearest(images: Embeddings, texts: Embeddings) -> list[int]:
    return list(map(int, (images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T).argmax(axis=1)))


def test_training_script_runs_and_admits_that_three_steps_are_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    options = ["--output", str(tmp_path), "--threads", "1", "--images-each", "1"]
    try:
        assert train_demo.main([*options, "--steps", "3", "--batch", "8"]) == 1
        assert train_demo.main([*options, "--evaluate-only"]) == 0
    finally:
        torch.set_num_threads(threads)
    written = DemoFiles(tmp_path)
    assert written.config.is_file()
    assert len(list(written.images.iterdir())) == len(IMAGED)
    report = json.loads(written.report.read_text(encoding="utf-8"))
    assert report["sha256"] == sha256_of(written.checkpoint)
    assert report["accuracy"]["top1"] < 0.05
    # The same file measured twice gives the same lines.
    first, second = (part for part in capsys.readouterr().out.split("held-out images")[1:])
    assert first == second
