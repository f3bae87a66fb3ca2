"""BLIP's oracle as models: with images that stand for the recorded pixels, and as exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_export import Model, load
from vlm_export.runtime.tasks import prepared_images


class Recorded:
    """A variant's model whose images are the recorded pixels: image i is one pixel with red = i."""

    def __init__(self, model: Model, record: dict[str, Any]) -> None:
        self.model, self.record = model, record
        self.images = [Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(3)]
        self.strings = record["strings"]


@pytest.fixture
def recorded(
    blip_bundle: Callable[[str], Path],
    blip_record: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Recorded]:
    def open_variant(variant: str) -> Recorded:
        record = blip_record(variant)

        def pixels(image: Image.Image, spec: object, *, name: str) -> Any:
            red = image.getpixel((0, 0))
            assert isinstance(red, tuple)
            return record["input.image"][int(red[0])]

        monkeypatch.setattr(prepared_images, "preprocess_image", pixels)
        return Recorded(load(blip_bundle(variant), threads=1), record)

    return open_variant


@pytest.fixture(scope="session")
def blip_model(blip_bundle: Callable[[str], Path]) -> Callable[[str], Model]:
    """The model of a variant, opened once; not to be changed."""
    models: dict[str, Model] = {}

    def opened(variant: str) -> Model:
        if variant not in models:
            models[variant] = load(blip_bundle(variant), threads=1)
        return models[variant]

    return opened


@pytest.fixture
def image(data: Path) -> Image.Image:
    image = Image.open(data / "blip" / "caption" / "image.png")
    image.load()  # Closes the file.
    return image
