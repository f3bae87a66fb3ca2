"""Captions of an exported bundle against the original's records, and what is asked in vain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_export import Model
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.generation import loop as generation
from vlm_export.runtime.tasks import caption as captioning
from vlm_export.runtime.tasks.caption import CaptionTask

pytestmark = pytest.mark.needs_torch

LONG = "the cat is on the table " * 12


def captioner_of(model: Model) -> CaptionTask:
    task = model.captioning
    assert isinstance(task, CaptionTask)
    return task


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_captions_are_the_originals(recorded: Callable[[str], Any], batch_size: int) -> None:
    it = recorded("caption")
    expected = it.strings["generated_text"]
    assert it.model.caption(it.images, batch_size=batch_size) == expected["text_beam3"]
    assert it.model.caption(it.images, beams=1, batch_size=batch_size) == expected["text_beam1"]
    assert it.model.caption(it.images[0]) == expected["text_beam3"][:1]


def test_sampled_captions_depend_on_the_seed_alone(recorded: Callable[[str], Any]) -> None:
    it = recorded("caption")
    sampled = it.model.caption(it.images, sample=True, seed=1)
    assert sampled == it.model.caption(it.images, sample=True, seed=1, batch_size=2)
    assert sampled != it.model.caption(it.images, sample=True, seed=2)
    assert sampled == it.model.caption(it.images, sample=True, seed=1, repetition_penalty=1.1)
    greedy = it.model.caption(it.images, beams=1)
    assert it.model.caption(it.images, sample=True, top_k=1, seed=9, repetition_penalty=1.0) == greedy


def test_lengths_count_the_prompt(blip_model: Callable[[str], Model], image: Image.Image) -> None:
    model = blip_model("caption")
    captioner = captioner_of(model)
    assert captioner.prompt_ids().tolist() == [155, *model.session.tokenizer.encode_rows(["a picture of"])[0][1:-1]]
    short = model.caption(image, max_length=5, beams=1)[0]
    assert len(model.session.tokenizer.encode_rows([short])[0]) <= 3
    with pytest.raises(UsageError, match="no room after the prompt"):
        model.caption(image, max_length=4)
    with pytest.raises(UsageError, match="positions"):
        model.caption(image, max_length=65)
    with pytest.raises(UsageError, match="min_length"):
        model.caption(image, min_length=30)


@pytest.mark.parametrize("prompt", ["", "the cat is", "The CAT  is ", "is the cat's", "[SEP] the cat"])
def test_any_prompt_is_cut_off_again(
    blip_model: Callable[[str], Model], image: Image.Image, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generated = blip_model("caption"), list[list[int]]()

    def generate(*arguments: Any, **options: Any) -> list[list[int]]:
        generated.extend(generation.generate(*arguments, **options))
        return generated

    monkeypatch.setattr(captioning, "generate", generate)
    captioner = captioner_of(model)
    (caption,) = model.caption(image, prompt=prompt, beams=1)
    ids = captioner.prompt_ids(prompt).tolist()
    start, whole = model.session.tokenizer.decode(ids), model.session.tokenizer.decode(generated[0])
    assert generated[0][: len(ids)] == ids
    assert caption
    assert caption == caption.strip()
    assert (start + caption).replace(" ", "") == whole.replace(" ", "")


def test_an_over_long_prompt_is_refused(blip_model: Callable[[str], Model], image: Image.Image) -> None:
    with pytest.raises(InputError, match="too long for the model"):
        blip_model("caption").caption(image, prompt=LONG)


def test_an_image_of_one_pixel_has_results(blip_model: Callable[[str], Model]) -> None:
    pixel, plain = Image.new("RGB", (1, 1), "red"), Image.new("RGB", (64, 64), "red")
    assert blip_model("caption").caption(pixel) == blip_model("caption").caption(plain)


def test_images_that_cannot_be_read_are_named(blip_model: Callable[[str], Model], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        blip_model("caption").caption(tmp_path / "broken.png")
    assert "broken.png" in caught.value.where
