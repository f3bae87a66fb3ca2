"""The committed BLIP demo: published in the original's form, right on held-out images, the same in both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.accuracy import BATCH, Asked, answer_exactness, caption_exactness, held_out_images, held_out_questions
from demo.blip import RECIPE
from demo.files import CAPTION, CLIP, VQA, Demo, DemoFiles
from demo.questions import KINDS, PROMPT
from demo.sentences import caption
from demo.torch_model import module_of, torch_model
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
FILES = {demo: DemoFiles(demo) for demo in (CAPTION, VQA)}
SHOWN = DemoFiles(CLIP)
ORIGINALS = {CAPTION: "caption/model_caption.pth", VQA: "vqa/model_vqa.pth"}
OfDemo = Callable[[Demo], Model]
of_each = pytest.mark.parametrize("demo", FILES, ids=lambda demo: demo.name)


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    """60 images that neither training nor the script's own measurement has seen."""
    return [draw(HELD_OUT[(7 * i) % len(HELD_OUT)], (4099, i)) for i in range(60)]


@pytest.fixture(scope="module")
def in_torch() -> OfDemo:
    torch.set_num_threads(1)
    loaded = {demo: torch_model(files.model(), files.tokenizer) for demo, files in FILES.items()}
    return loaded.__getitem__


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> OfDemo:
    """The checkpoints as a user exports them: by their names, offline."""
    folder = tmp_path_factory.mktemp("blip-demo")
    for demo in FILES:
        export_bundle(demo.name, folder / demo.name, ExportOptions(opset=17, threads=1))
    opened = {demo: load(folder / demo.name, threads=1) for demo in FILES}
    return opened.__getitem__


def answers(model: Model, asked: Asked, *, attend_padding: bool = True) -> list[str]:
    """Questions see the padding of their batch, so the batches have to be the same."""
    images, texts = [drawing.image for drawing, _ in asked], [question.text for _, question in asked]
    return model.answer(images, texts, beams=1, batch_size=BATCH, attend_padding=attend_padding)


def share(said: list[str], truths: list[str]) -> float:
    return sum(text == truth for text, truth in zip(said, truths, strict=True)) / len(truths)


def test_captions_are_right_and_the_same_in_onnx(drawings: list[Drawing], in_torch: OfDemo, bundles: OfDemo) -> None:
    truths = [caption(drawing.composition).removeprefix(PROMPT) for drawing in drawings]
    images = [drawing.image for drawing in drawings]
    said = in_torch(CAPTION).caption(images, beams=1)
    assert share(said, truths) >= 0.9
    assert bundles(CAPTION).caption(images, beams=1) == said
    # What `caption` does when nothing is asked for.
    assert bundles(CAPTION).caption(images[:16]) == in_torch(CAPTION).caption(images[:16], beams=3)


def test_answers_are_right_and_the_same_in_onnx(drawings: list[Drawing], in_torch: OfDemo, bundles: OfDemo) -> None:
    asked = held_out_questions(drawings)
    said = answers(in_torch(VQA), asked)
    assert share(said, [question.answer for _, question in asked]) >= 0.9
    assert answers(bundles(VQA), asked) == said
    assert share(answers(bundles(VQA), asked, attend_padding=False), said) >= 0.98


def test_yes_and_no_are_told_apart(drawings: list[Drawing], in_torch: OfDemo) -> None:
    asked = [(drawing, question) for drawing, question in held_out_questions(drawings * 2) if question.kind == "exists"]
    assert {question.answer for _, question in asked} == {"yes", "no"}
    assert share(answers(in_torch(VQA), asked), [question.answer for _, question in asked]) >= 0.85


def test_demo_images_get_their_captions(bundles: OfDemo) -> None:
    images = sorted(SHOWN.images.iterdir())
    said = [PROMPT + text for text in bundles(CAPTION).caption(images)]
    assert said == SHOWN.captions.read_text(encoding="utf-8").splitlines()


def test_an_image_answers_for_itself(bundles: OfDemo) -> None:
    image = SHOWN.images / "green-triangle-small-two-left.png"
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
    bundles: OfDemo,
) -> None:
    black = Image.new("RGB", (30, 200))
    assert bundles(CAPTION).caption([black]) != bundles(CAPTION).caption([draw(HELD_OUT[0], 1).image])


@of_each
def test_report_is_about_this_file(demo: Demo, in_torch: OfDemo) -> None:
    written: dict[str, Any] = json.loads(FILES[demo].report.read_text(encoding="utf-8"))
    assert written["sha256"] == FILES[demo].sha256
    assert written["size_bytes"] == FILES[demo].weights.stat().st_size
    greedy = written["exact_match"]["greedy"]
    assert greedy["exact"] >= 0.9
    # The report was measured on four times as many images.
    drawings = held_out_images(len(HELD_OUT))
    if demo == CAPTION:
        found = caption_exactness(partial(in_torch(demo).caption, beams=1), drawings)
    else:
        found = answer_exactness(partial(in_torch(demo).answer, beams=1), held_out_questions(drawings))
    assert found.exact == pytest.approx(greedy["exact"], abs=0.04)
    assert list(greedy["by_kind"]) == (["caption"] if demo == CAPTION else list(KINDS))


def test_both_files_are_small() -> None:
    assert sum(files.weights.stat().st_size for files in FILES.values()) <= RECIPE.max_bytes


@of_each
def test_config_pins_this_file_and_its_architecture(demo: Demo) -> None:
    known, checkpoint, files = load_known(demo.name), open_checkpoint(demo.name), FILES[demo]
    model = files.model()
    assert recognise(checkpoint).name == known.family == "blip"
    assert known.sha256 == files.sha256 == checkpoint.files[0].sha256
    assert dict(known.architecture) == dict(BlipFamily().describe(checkpoint).architecture)
    assert checkpoint.side_files["tokenizer.json"].read_bytes() == files.tokenizer.read_bytes()
    assert (known.image, known.text) == (model.image, model.text)


@of_each
def test_keys_are_the_originals(demo: Demo) -> None:
    """The oracle's files, saved by Salesforce's own classes, have the same keys; theirs are of two layers, too."""
    ours = open_checkpoint(str(FILES[demo].checkpoint)).tensors
    original = open_checkpoint(str(ROOT / "tests" / "data" / "blip" / ORIGINALS[demo])).tensors
    assert {without_numbers(key) for key in ours} == {without_numbers(key) for key in original}
    assert {key: len(ours[key].shape) for key in ours if key in original} == {
        key: len(info.shape) for key, info in original.items() if key in ours
    }


def without_numbers(key: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in key.split("."))


def test_tied_weights_are_stored_twice() -> None:
    for files in FILES.values():
        state = torch.load(files.checkpoint, weights_only=True)["model"]
        words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
        assert torch.equal(words, state["text_decoder.cls.predictions.decoder.weight"])
        assert torch.equal(
            state["text_decoder.cls.predictions.bias"], state["text_decoder.cls.predictions.decoder.bias"]
        )


def test_one_zeroed_matrix_ruins_the_captions(drawings: list[Drawing]) -> None:
    broken = FILES[CAPTION].model()
    module_of(broken, "vision").get_parameter("vision.blocks.1.mlp.fc2.weight").zero_()
    images = [drawing.image for drawing in drawings]
    said = torch_model(broken, FILES[CAPTION].tokenizer).caption(images, beams=1)
    assert share(said, [caption(drawing.composition).removeprefix(PROMPT) for drawing in drawings]) < 0.6
