"""The committed BLIP demo: published in the original's form, right on held-out images, the same in both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.blip_accuracy import Parts, answer_exactness, caption_exactness, held_out_images, held_out_questions
from demo.blip_checkpoint import torch_parts
from demo.blip_files import CAPTION, NAMES, VQA, BlipDemoFiles
from demo.blip_vocab import load_tokenizer
from demo.checkpoint import load_model
from demo.files import DemoFiles, sha256_of
from demo.questions import KINDS, PROMPT
from demo.sentences import caption
from demo.world import HELD_OUT, Drawing, draw
from PIL import Image

from vlm_export import Model, load
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.models.blip.family import BlipFamily
from vlm_export.models.registry import recognise

ROOT = Path(__file__).resolve().parents[2]
FILES = BlipDemoFiles(ROOT / "configs")
ORIGINALS = {CAPTION: "caption/model_caption.pth", VQA: "vqa/model_vqa.pth"}
LoadParts = Callable[[str], Parts]


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    """60 images that neither training nor the script's own measurement has seen."""
    return [draw(HELD_OUT[(7 * i) % len(HELD_OUT)], (4099, i)) for i in range(60)]


@pytest.fixture(scope="module")
def parts() -> LoadParts:
    torch.set_num_threads(1)
    loaded = {name: torch_parts(load_model(FILES.checkpoint(name)), load_tokenizer(FILES.tokenizer)) for name in NAMES}
    return loaded.__getitem__


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The checkpoints as a user exports them: by their names, offline."""
    folder = tmp_path_factory.mktemp("blip-demo")
    for name in NAMES:
        export_bundle(name, folder / name, ExportOptions(opset=17, threads=1))
    opened = {name: load(folder / name, threads=1) for name in NAMES}
    return opened.__getitem__


def report(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILES.report(name).read_text(encoding="utf-8"))
    return data


def share(said: list[str], truths: list[str]) -> float:
    return sum(text == truth for text, truth in zip(said, truths, strict=True)) / len(truths)


def test_captions_are_right_and_the_same_in_onnx(
    drawings: list[Drawing], parts: LoadParts, bundles: Callable[[str], Model]
) -> None:
    truths = [caption(drawing.composition).removeprefix(PROMPT) for drawing in drawings]
    in_torch = parts(CAPTION).captions(drawings)
    images = [drawing.image for drawing in drawings]
    assert share(in_torch, truths) >= 0.9
    assert bundles(CAPTION).caption(images, beams=1) == in_torch
    # What `caption` does when nothing is asked for.
    assert bundles(CAPTION).caption(images[:16]) == parts(CAPTION).captions(drawings[:16], beams=3)


def test_answers_are_right_and_the_same_in_onnx(
    drawings: list[Drawing], parts: LoadParts, bundles: Callable[[str], Model]
) -> None:
    asked = held_out_questions(drawings)
    images, texts = [drawing.image for drawing, _ in asked], [question.text for _, question in asked]
    in_torch = parts(VQA).answers(asked)
    assert share(in_torch, [question.answer for _, question in asked]) >= 0.9
    # Questions see the padding of their batch, so the batches have to be the same.
    assert bundles(VQA).answer(images, texts, beams=1, batch_size=64) == in_torch
    alone = bundles(VQA).answer(images, texts, beams=1, batch_size=64, attend_padding=False)
    assert share(alone, in_torch) >= 0.98


def test_yes_and_no_are_told_apart(drawings: list[Drawing], parts: LoadParts) -> None:
    asked = [(drawing, question) for drawing, question in held_out_questions(drawings * 2) if question.kind == "exists"]
    answers = parts(VQA).answers(asked)
    assert {question.answer for _, question in asked} == {"yes", "no"}
    assert share(answers, [question.answer for _, question in asked]) >= 0.85


def test_demo_images_get_their_captions(bundles: Callable[[str], Model]) -> None:
    shown = DemoFiles(ROOT / "configs")
    images = sorted(shown.images.iterdir())
    said = [PROMPT + text for text in bundles(CAPTION).caption(images)]
    assert said == shown.captions.read_text(encoding="utf-8").splitlines()


def test_an_image_answers_for_itself(bundles: Callable[[str], Model]) -> None:
    image = DemoFiles(ROOT / "configs").images / "green-triangle-small-two-left.png"
    truths = {
        "What colour are the triangles?": "green",
        "what shape are they": "triangle",
        "How many objects are in the picture?": "two",
        "where are they?": "on the left",
        "Are there any green triangles?": "yes",
        "Is there a red triangle?": "no",
        "what do you see?": "two small green triangles",
    }
    assert bundles(VQA).answer([image] * len(truths), list(truths)) == list(truths.values())


def test_another_image_gets_another_caption_and_a_black_one_is_no_error(
    bundles: Callable[[str], Model],
) -> None:
    black = Image.new("RGB", (30, 200))
    assert bundles(CAPTION).caption([black]) != bundles(CAPTION).caption([draw(HELD_OUT[0], 1).image])


@pytest.mark.parametrize("name", NAMES)
def test_report_is_about_this_file(name: str, parts: LoadParts) -> None:
    written = report(name)
    assert written["sha256"] == sha256_of(FILES.checkpoint(name))
    assert written["size_bytes"] == FILES.checkpoint(name).stat().st_size
    greedy = written["exact_match"]["greedy"]
    assert greedy["exact"] >= 0.9
    measure = caption_exactness if name == CAPTION else answer_exactness
    # The report was measured on four times as many images.
    assert measure(parts(name), held_out_images(len(HELD_OUT))).exact == pytest.approx(greedy["exact"], abs=0.04)
    assert list(greedy["by_kind"]) == (["caption"] if name == CAPTION else list(KINDS))


def test_both_files_are_small() -> None:
    assert FILES.size_bytes() <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_config_pins_this_file_and_its_architecture(name: str) -> None:
    known, checkpoint = load_known(name), open_checkpoint(name)
    model = load_model(FILES.checkpoint(name))
    assert recognise(checkpoint).name == known.family == "blip"
    assert known.sha256 == sha256_of(FILES.checkpoint(name)) == checkpoint.files[0].sha256
    assert dict(known.architecture) == dict(BlipFamily().describe(checkpoint).architecture)
    assert checkpoint.side_files["tokenizer.json"].read_bytes() == FILES.tokenizer.read_bytes()
    assert (known.image, known.text) == (model.image, model.text)


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_originals(name: str) -> None:
    """The oracle's files, saved by Salesforce's own classes, have the same keys; theirs are of two layers, too."""
    ours = open_checkpoint(str(FILES.checkpoint(name))).tensors
    original = open_checkpoint(str(ROOT / "tests" / "data" / "blip" / ORIGINALS[name])).tensors
    assert {without_numbers(key) for key in ours} == {without_numbers(key) for key in original}
    assert {key: len(ours[key].shape) for key in ours if key in original} == {
        key: len(info.shape) for key, info in original.items() if key in ours
    }


def without_numbers(key: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in key.split("."))


def test_tied_weights_are_stored_twice() -> None:
    for name in NAMES:
        state = torch.load(FILES.checkpoint(name), weights_only=True)["model"]
        words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
        assert torch.equal(words, state["text_decoder.cls.predictions.decoder.weight"])
        assert torch.equal(
            state["text_decoder.cls.predictions.bias"], state["text_decoder.cls.predictions.decoder.bias"]
        )


def test_one_zeroed_matrix_ruins_the_captions(drawings: list[Drawing]) -> None:
    broken = load_model(FILES.checkpoint(CAPTION))
    vision = next(part.module for part in broken.parts if part.name == "vision")
    vision.get_parameter("vision.blocks.1.mlp.fc2.weight").zero_()
    said = torch_parts(broken, load_tokenizer(FILES.tokenizer)).captions(drawings)
    assert share(said, [caption(drawing.composition).removeprefix(PROMPT) for drawing in drawings]) < 0.6
