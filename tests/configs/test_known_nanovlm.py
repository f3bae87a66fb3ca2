"""nanoVLM's configs say what the published files are."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.models.nanovlm.architecture import NanoVlmArchitecture
from vlm_export.models.nanovlm.family import NanoVlmFamily
from vlm_export.specs import ImageSpec

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "models" / "nanovlm_oracle.py")))
# Hub id's last part → parameters, as the original counts them, and features of an image or tile.
PUBLISHED = {
    "nanoVLM-222M": (222_081_600, 49),
    "nanoVLM-450M": (450_614_400, 64),
    "nanoVLM-460M-8k": (460_113_984, 64),
}


def test_every_published_model_has_its_config() -> None:
    names = {name for name in known_names() if name.startswith("nanovlm-") and "demo" not in name}
    assert names == {name.lower() for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_are_the_published_ones(name: str) -> None:
    known, family = load_known(name.lower()), NanoVlmFamily()
    assert known.source.hub == f"lusxvr/{name}"
    architecture = NanoVlmArchitecture.from_config(known.architecture)
    assert architecture.to_json() == known.architecture
    tensors = family.published_tensors(known.architecture)
    expected = oracle.read_manifests()[name.lower()]
    del expected["decoder.token_embedding.weight"]  # stored once, under the head's name
    assert {key: info.shape for key, info in tensors.items()} == expected
    sizes = [info.shape for key, info in tensors.items() if "inv_freq" not in key]
    parameters, features = PUBLISHED[name]
    assert sum(_product(shape) for shape in sizes) == parameters
    assert architecture.tokens_per_tile == features


@pytest.mark.parametrize("name", PUBLISHED)
def test_preparation_fits_the_architecture(name: str) -> None:
    known = load_known(name.lower())
    architecture = NanoVlmArchitecture.from_config(known.architecture)
    if architecture.chat.layout == "tiles":
        assert known.image is None
        assert architecture.chat.max_side_pixels % architecture.image_size == 0
        return
    assert isinstance(known.image, ImageSpec)
    assert known.image.size_pixels == architecture.image_size
    assert (known.image.resize, known.image.mean, known.image.std) == ("stretch", (0, 0, 0), (1, 1, 1))


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
