"""What a new family takes: its folder and one line of the registry. Nothing else of the project knows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from vlm_export import export, load, verify
from vlm_export.models import registry

WORDS = ("[PAD]", "[END]", "a", "red", "blue", "ring", "square", "of", "photo")


@pytest.fixture(scope="module")
def toy() -> Iterator[ModuleType]:
    """The family's module, found by its name as the registry finds one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield import_module("toy_family")


@pytest.fixture(scope="module")
def checkpoint(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the toy's authors would publish it."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    folder.mkdir()
    save_file(toy.toy_state(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["ToyModel"]}))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", toy.END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "[END]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_family_is_one_folder_and_one_line(
    toy: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.FAMILIES, "toy", "toy_family:ToyFamily")
    result = export(checkpoint, tmp_path / "bundle")
    assert result.manifest.family == "toy"
    assert all(report.passed for report in result.reports)
    assert verify(tmp_path / "bundle").passed
    assert verify(tmp_path / "bundle", checkpoint).passed

    model, state = load(tmp_path / "bundle"), toy.toy_state()
    assert set(model.tasks) == {"embed"}
    image = np.full((4, 4, 3), 200, np.uint8)
    pixels = torch.full((3 * 16,), (200 / 255 - 0.5) / 0.5)
    seen = state["toy_pixels.weight"] @ pixels + state["toy_pixels.bias"]
    images = model.encode_image(image)
    np.testing.assert_allclose(images[0], seen / seen.norm(), atol=1e-6)

    ids = [*(WORDS.index(word) for word in ("red", "ring")), toy.END]
    padded = torch.tensor(ids + [toy.PAD] * (toy.CONTEXT - len(ids)))
    read = state["toy_tokens.weight"][padded].mean(dim=0)
    texts = model.encode_text("red ring")
    np.testing.assert_allclose(texts[0], read / read.norm(), atol=1e-6)

    (share,) = model.classify(image, ["red ring"], template="{}")[0]
    logit = state["toy_scale"].exp() * float(images[0] @ texts[0]) + state["toy_bias"]
    assert share == pytest.approx(float(torch.sigmoid(logit)), abs=1e-6)
