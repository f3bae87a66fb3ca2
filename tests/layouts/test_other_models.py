"""Models beside CLIP: each consumer gets graphs that are right for it, or says why it cannot have them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError
from vlm_export.layouts.package import CONSUMERS, package
from vlm_export.runtime.inputs.chat_prompt import PromptForm
from vlm_export.specs.tasks import ChatSpec

models = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_models.py"))))
TEXTS = ["red circle", "two dogs and one cat", "a"]
Bundle = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundle(shared_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`bundle("SigLIP")`: a tiny model of that kind, exported once; tests must not change it."""

    def make(name: str) -> Path:
        def export(target: Path) -> None:
            source = tmp_path_factory.mktemp("source") / "model"
            models.MAKERS[name](source)
            options = models.OPTIONS.get(name, {})
            source = next(source.glob("*.pth"), source)
            vlm_export.export(str(source), target, exporter="torchscript", opset=18, threads=1, **options)

        return shared_bundle(f"packaged-{name}", export)

    return make


# Model → consumer that refuses it → how the reason begins; docs/packaging.md shows it, too.
REFUSED = json.loads(Path(__file__).with_name("refused.json").read_text(encoding="utf-8"))
FAST = ("SigLIP", "AltCLIP", "MetaCLIP 2", "CLIP, images alone")
KINDS = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in REFUSED]


def test_every_model_has_its_row() -> None:
    assert set(REFUSED) == set(models.MAKERS)


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", KINDS)
def test_written_or_refused(bundle: Bundle, tmp_path: Path, name: str, consumer: str) -> None:
    """Writing proves each graph by the golden records of the bundle, as the consumer has them."""
    reason = REFUSED[name].get(consumer)
    if reason is None:
        made = package(bundle(name), tmp_path / "out", consumer, threads=1)
        assert all(report.passed for report in made.reports)
        # What was not made for the consumer is the bundle's own.
        own, proved = open_bundle(bundle(name)).manifest, {report.part for report in made.reports}
        assert all(part.name in proved or part == own.part(part.name) for part in made.manifest.parts)
    else:
        with pytest.raises(InputError, match="cannot use this bundle") as error:
            package(bundle(name), tmp_path / "out", consumer, threads=1)
        assert str(error.value.expected).startswith(reason)


def run(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_same_directions(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got / np.linalg.norm(got, axis=1, keepdims=True), expected, atol=2e-6)


@pytest.mark.parametrize("consumer", ["fastembed", "sentence-transformers"])
def test_texts_up_to_the_longest_one(bundle: Bundle, tmp_path: Path, consumer: str) -> None:
    """A model that was trained with texts of 64 tokens gets them from hosts that fill up to the longest text only."""
    package(bundle("SigLIP"), tmp_path / "out", consumer, threads=1)
    model = vlm_export.load(bundle("SigLIP"), threads=1)
    spec = model.manifest.text
    assert spec is not None
    rows = model.session.tokenizer.encode_rows(TEXTS)
    ids = np.full((len(rows), max(map(len, rows))), spec.pad_token_id)
    for row, own in zip(ids, rows, strict=True):
        row[: len(own)] = own
    file, output = ("text/model.onnx", "text_embeds")
    if consumer == "sentence-transformers":
        file, output = "onnx/model.onnx", "last_hidden_state"
    found = run(tmp_path / "out" / file, {"input_ids": ids})[output]
    assert_same_directions(found.reshape(len(rows), -1), model.encode_text(TEXTS))


@pytest.mark.parametrize(
    "name", ["SigLIP", "MetaCLIP 2", "AltCLIP", pytest.param("Chinese-CLIP", marks=pytest.mark.slow)]
)
def test_immich_fills_texts_as_the_original(bundle: Bundle, tmp_path: Path, name: str) -> None:
    """Its loader takes the id of `pad_token` and the context length of the config."""
    package(bundle(name), tmp_path / "out", "immich", threads=1)
    folder = tmp_path / "out"
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    token = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
    tokenizer.enable_padding(length=length, pad_token=token, pad_id=tokenizer.token_to_id(token))
    tokenizer.enable_truncation(max_length=length)
    rows = [
        next(iter(run(folder / "textual" / "model.onnx", {"text": np.array([ids], np.int32)}).values()))[0]
        for ids in (entry.ids for entry in tokenizer.encode_batch(TEXTS))
    ]
    assert_same_directions(np.array(rows), vlm_export.load(bundle(name), threads=1).encode_text(TEXTS))


def test_scores_and_names_of_sigmoid_models(bundle: Bundle, tmp_path: Path) -> None:
    """transformers' `SiglipModel` computes the logits; its towers call embeddings `pooler_output`."""
    from transformers import SiglipModel

    package(bundle("SigLIP"), tmp_path / "out", "transformers.js", threads=1)
    model = vlm_export.load(tmp_path / "out", threads=1)
    ids = model.session.tokenizer.pad_masked(model.session.tokenizer.encode_rows(TEXTS))[0]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 34, 34)).astype(np.float32)
    tests = models.module("test_siglip")
    original = tests.save(tmp_path / "model", tests.siglip_tokenizer(tmp_path / "pieces"))
    assert isinstance(original, SiglipModel)
    with torch.inference_mode():
        expected = original(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels))
    feeds = {"input_ids": ids, "pixel_values": pixels}
    found = run(tmp_path / "out" / "onnx" / "model.onnx", feeds)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        np.testing.assert_allclose(found[name], expected[name].numpy(), atol=2e-5)
    tower = run(tmp_path / "out" / "onnx" / "vision_model.onnx", {"pixel_values": pixels})
    assert list(tower) == ["image_embeds", "pooler_output"]
    np.testing.assert_array_equal(tower["pooler_output"], tower["image_embeds"])


@pytest.mark.parametrize("variant", ["222m", "450m", "split"])
def test_the_chat_template_writes_our_prompt(nanovlm_bundle: Bundle, tmp_path: Path, variant: str) -> None:
    """With transformers' own tokenizer, a question about one image and one without become the ids of the runtime."""
    packed = package(nanovlm_bundle(variant), tmp_path / "out", "transformers.js", threads=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = vlm_export.load(tmp_path / "out", threads=1)
    spec = model.manifest.task(ChatSpec)
    assert spec is not None
    assert any("this model's prompt has none" in note for note in packed.notes) == (spec.layout == "prepended")
    words = {"type": "text", "text": "What's this, a \n cat?"}
    for grids, content in (([(1, 1)], [{"type": "image"}, words]), ([], words["text"])):
        if spec.layout == "prepended" and not grids:
            continue
        expected = model.session.tokenizer.prompt_ids(PromptForm(spec).text(words["text"], grids))
        found = tokenizer.apply_chat_template([{"role": "user", "content": content}], return_dict=False)
        assert found == expected
