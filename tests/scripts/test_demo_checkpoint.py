"""The committed demo checkpoint: it works, it is what its config and its report say, and its script runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_demo
from demo.accuracy import Accuracy, Embeddings, held_out_drawings
from demo.clip import evaluate_model
from demo.files import CLIP, IMAGED, DemoFiles, image_name
from demo.sentences import caption
from demo.tokens import clip_rows, clip_tokenizer
from demo.torch_model import module_of, torch_model
from demo.world import COMPOSITIONS
from PIL import Image
from tokenizers import Tokenizer as RustTokenizer

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.family import Model
from vlm_export.models.clip.family import ClipFamily
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.runtime.tasks.embed import EmbedTask

FILES = DemoFiles(CLIP)
SENTENCES = ("two big red stars", "A photo of a Cat, 🐈 naïve", "", "  spaced   out ", "x" * 200)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return FILES.model()


@pytest.fixture(scope="module")
def encoders(model: Model) -> EmbedTask:
    return torch_model(model, FILES.tokenizer).embedding


@pytest.fixture(scope="module")
def measured(model: Model) -> Accuracy:
    return evaluate_model(FILES, model, held_out_drawings(2))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILES.report.read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="module")
def tokenizer() -> RustTokenizer:
    return RustTokenizer.from_file(str(FILES.tokenizer))


def test_held_out_compositions_are_recognised(measured: Accuracy) -> None:
    assert measured.candidates == len(COMPOSITIONS)
    assert measured.top1 >= 0.95
    assert min(measured.by_attribute.values()) >= 0.97
    assert measured.colour_and_shape >= 0.9


def test_report_is_about_this_file(report: dict[str, Any], measured: Accuracy) -> None:
    assert report["sha256"] == FILES.sha256
    assert report["size_bytes"] == FILES.checkpoint.stat().st_size <= 8_000_000
    assert report["accuracy"]["top1"] >= 0.95
    # The report was measured on twice as many images.
    assert report["accuracy"]["top1"] == pytest.approx(measured.top1, abs=0.02)


def test_one_zeroed_matrix_ruins_the_metric() -> None:
    broken = FILES.model()
    module_of(broken, "vision").get_parameter("blocks.1.mlp.fc2.weight").zero_()
    assert evaluate_model(FILES, broken, held_out_drawings(1)).top1 < 0.8


def test_config_pins_this_file_and_its_architecture() -> None:
    known = load_known("clip-demo")
    checkpoint = open_checkpoint("clip-demo")
    assert known.sha256 == FILES.sha256 == checkpoint.files[0].sha256
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
    ids = clip_rows(tokenizer, texts)
    assert np.array_equal(ids, Tokenizer(FILES.tokenizer, model.text).encode(texts))
    assert ids.shape[1] <= model.text.context_length


def test_tokenizer_training_is_deterministic(tokenizer: RustTokenizer) -> None:
    assert clip_tokenizer(0).get_vocab() == tokenizer.get_vocab()


def test_images_are_held_out_and_recognised(encoders: EmbedTask) -> None:
    paths = sorted(FILES.images.iterdir())
    captions = FILES.captions.read_text(encoding="utf-8").splitlines()
    assert [path.name for path in paths] == sorted(map(image_name, IMAGED))
    assert sorted(captions) == sorted(map(caption, IMAGED))
    assert all(composition.held_out for composition in IMAGED)
    sources = [Image.open(path) for path in paths]
    images, texts = encoders.encode_image(sources), encoders.encode_text(captions)
    assert nearest(images, texts) == list(range(len(paths)))


def test_quickstart_labels_name_the_first_image(encoders: EmbedTask) -> None:
    first = sorted(FILES.images.iterdir())[0]
    labels = ["a red circle", "a blue circle", "a red square", "a blue square"]
    assert nearest(encoders.encode_image([Image.open(first)]), encoders.encode_text(labels)) == [1]


def nearest(images: Embeddings, texts: Embeddings) -> list[int]:
    return list(map(int, (images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T).argmax(axis=1)))


def test_training_script_runs_and_admits_that_three_steps_are_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    options = ["--output", str(tmp_path), "--threads", "1", "--images", "215"]
    try:
        assert train_demo.main([*options, "--steps", "3", "--batch", "8"]) == 1
        assert train_demo.main([*options, "--evaluate-only"]) == 1
    finally:
        torch.set_num_threads(threads)
    written = DemoFiles(CLIP, tmp_path)
    assert written.config.is_file()
    assert len(list(written.images.iterdir())) == len(IMAGED)
    report = json.loads(written.report.read_text(encoding="utf-8"))
    assert report["sha256"] == written.sha256
    assert report["accuracy"]["top1"] < 0.05
    # The same file measured twice gives the same lines.
    first, second = (part for part in capsys.readouterr().out.split("clip-demo\n")[1:])
    assert first == second
