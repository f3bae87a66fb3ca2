"""The committed nanoVLM demo: in the published form, right on held-out images, the same in both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.accuracy import answer_exactness, held_out_chat, held_out_images
from demo.files import CHAT, DemoFiles
from demo.nanovlm import RECIPE
from demo.questions import CAPTION, KINDS, caption_question
from demo.tokens import chat_tokenizer_json
from demo.torch_model import load_model, module_of, torch_model
from demo.world import HELD_OUT, Drawing, draw
from PIL import Image
from safetensors import safe_open

from vlm_export import Model, load
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.models.nanovlm.family import NanoVlmFamily
from vlm_export.models.nanovlm.weights import EMBEDDING_KEY, HEAD_KEY
from vlm_export.models.registry import recognise
from vlm_export.runtime.tasks.chat import CAPTION_QUESTION
from vlm_export.specs.tasks import ChatSpec

ROOT = Path(__file__).resolve().parents[2]
FILES = DemoFiles(CHAT)
PUBLISHED_FORM = ROOT / "tests" / "data" / "nanovlm" / "450m"


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    """40 images that neither training nor the script's own measurement has seen."""
    return [draw(HELD_OUT[(11 * i) % len(HELD_OUT)], (4111, i)) for i in range(40)]


@pytest.fixture(scope="module")
def in_torch() -> Model:
    torch.set_num_threads(1)
    return torch_model(FILES.model(), FILES.tokenizer)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a user exports it: by its name, verified, offline."""
    folder = tmp_path_factory.mktemp("nanovlm-demo") / "chat"
    export_bundle(CHAT.name, folder, ExportOptions(opset=17, threads=1))
    return folder


@pytest.fixture(scope="module")
def chat(bundle: Path) -> Model:
    return load(bundle, threads=1)


def report() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILES.report.read_text(encoding="utf-8"))
    return data


def share(said: list[str], truths: list[str]) -> float:
    return sum(text == truth for text, truth in zip(said, truths, strict=True)) / len(truths)


def test_answers_are_right_and_the_same_in_onnx(drawings: list[Drawing], in_torch: Model, chat: Model) -> None:
    asked = held_out_chat(drawings)
    images, questions = [drawing.image for drawing, _ in asked], [question.text for _, question in asked]
    said, truths = in_torch.answer(images, questions), [question.answer for _, question in asked]
    assert share(said, truths) >= 0.9
    captions = [i for i, (_, question) in enumerate(asked) if question.kind == CAPTION]
    assert share([said[i] for i in captions], [truths[i] for i in captions]) >= 0.9
    yes_or_no = [i for i, (_, question) in enumerate(asked) if question.kind == "exists"]
    assert {truths[i] for i in yes_or_no} == {"yes", "no"}
    assert share([said[i] for i in yes_or_no], [truths[i] for i in yes_or_no]) >= 0.85
    few = slice(0, 10 * (1 + len(KINDS)))
    assert chat.answer(images[few], questions[few]) == said[few]


def test_demo_images_get_their_captions(chat: Model) -> None:
    images = sorted(FILES.images.iterdir())
    truths = FILES.captions.read_text(encoding="utf-8").splitlines()
    said = [f"a picture of {text}" for text in chat.caption(images)]
    # Of the four small rings it counts three.
    assert share(said, truths) >= 0.9
    assert len(set(said)) == len(images)


def test_an_image_answers_for_itself_and_streams_the_same(chat: Model) -> None:
    image = FILES.images / "green-triangle-small-two-left.png"
    truths = {
        "What colour are the triangles?": "green",
        "what shape are they": "triangle",
        "How many objects are in the picture?": "two",
        "where are they?": "on the left",
        "Are there any green triangles?": "yes",
        "Is there a red triangle?": "no",
        CAPTION_QUESTION: "two small green triangles on the left",
    }
    assert chat.answer(image, list(truths)) == list(truths.values())
    pieces = [list(chat.stream(image, question)) for question in truths]
    assert ["".join(own) for own in pieces] == list(truths.values())
    assert len(pieces[-1]) == 7


def test_words_beyond_the_world_and_a_black_image_are_no_error(chat: Model) -> None:
    assert isinstance(chat.answer(Image.new("RGB", (30, 200)), "Is there a giraffe? 🦒")[0], str)


def test_one_zeroed_matrix_ruins_the_captions(drawings: list[Drawing]) -> None:
    broken = FILES.model()
    module_of(broken, "vision_encoder").get_parameter("projection.weight").zero_()
    truths = [caption_question(drawing.composition).answer for drawing in drawings]
    said = torch_model(broken, FILES.tokenizer).caption([drawing.image for drawing in drawings])
    assert share(said, truths) < 0.2


def test_report_is_about_this_file(in_torch: Model) -> None:
    written = report()
    assert written["sha256"] == FILES.sha256
    assert written["size_bytes"] == FILES.weights.stat().st_size <= RECIPE.max_bytes
    greedy = written["exact_match"]["greedy"]
    assert min(greedy["exact"], greedy["by_kind"][CAPTION]) >= 0.9
    assert list(greedy["by_kind"]) == [CAPTION, *KINDS]
    # The report was measured on more images.
    asked = held_out_chat(held_out_images(60))
    assert answer_exactness(in_torch.answer, asked).exact == pytest.approx(greedy["exact"], abs=0.04)


def test_config_pins_this_file_and_its_architecture() -> None:
    known, checkpoint = load_known(CHAT.name), open_checkpoint(CHAT.name)
    assert recognise(checkpoint).name == known.family == "nanovlm"
    pinned = {file.name: file.sha256 for file in checkpoint.files}
    assert known.sha256 == FILES.sha256 == pinned["model.safetensors"]
    assert dict(known.architecture) == dict(NanoVlmFamily().describe(checkpoint).architecture)
    assert known.image == FILES.model().image
    assert FILES.tokenizer.read_text(encoding="utf-8") == chat_tokenizer_json()


def test_keys_and_layout_are_those_of_the_second_generation() -> None:
    """The fixture, saved by nanoVLM's own classes, has the same keys."""
    ours, original = open_checkpoint(str(FILES.checkpoint)), open_checkpoint(str(PUBLISHED_FORM))
    assert {without_numbers(key) for key in ours.tensors} == {without_numbers(key) for key in original.tensors}
    assert {key: len(ours.tensors[key].shape) for key in ours.tensors if key in original.tensors} == {
        key: len(info.shape) for key, info in original.tensors.items() if key in ours.tensors
    }
    assert ours.config is not None
    assert original.config is not None
    assert set(ours.config) <= set(original.config)
    chats = [load_model(folder).task(ChatSpec) for folder in (FILES.checkpoint, PUBLISHED_FORM)]
    same = ("layout", "prompt", "image_token", "eos_token_ids", "max_new_tokens")
    assert [getattr(chats[0], name) for name in same] == [getattr(chats[1], name) for name in same]


def without_numbers(key: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in key.split("."))


def test_tied_head_is_stored_once() -> None:
    with safe_open(str(FILES.weights), "pt") as opened:
        stored = set(opened.keys())
        assert HEAD_KEY in stored
        assert EMBEDDING_KEY not in stored
        assert opened.metadata() == {EMBEDDING_KEY: HEAD_KEY}
