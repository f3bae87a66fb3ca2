"""The configs are complete, exact and strictly read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vlm_export.checkpoint.sources.known import KnownCheckpoint, known_from_yaml, known_names, load_known, packaged_path
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.models.clip.architecture import ClipArchitecture
from vlm_export.models.clip.family import ClipFamily
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.models.registry import FAMILIES, load_family
from vlm_export.specs import ImageSpec

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests" / "clip.json.gz"
OPENAI = {
    "clip-rn50": "RN50",
    "clip-rn101": "RN101",
    "clip-rn50x4": "RN50x4",
    "clip-rn50x16": "RN50x16",
    "clip-rn50x64": "RN50x64",
    "clip-vit-b-32": "ViT-B-32",
    "clip-vit-b-16": "ViT-B-16",
    "clip-vit-l-14": "ViT-L-14",
    "clip-vit-l-14-336px": "ViT-L-14-336px",
}
HUGGINGFACE = {
    "clip-vit-base-patch32-hf": "clip-vit-b-32",
    "clip-vit-base-patch16-hf": "clip-vit-b-16",
    "clip-vit-large-patch14-hf": "clip-vit-l-14",
    "clip-vit-large-patch14-336-hf": "clip-vit-l-14-336px",
}
MINIMAL = """
family: clip
title: A title
source: {hub: owner/name}
architecture: {}
tolerances:
  fp32: {max_abs: 0.0001, cosine: 0.99999}
"""


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, list[int]]]:
    """Model name → key → shape, from OpenAI's own class."""
    data: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(MANIFESTS.read_bytes()))
    return data


@pytest.mark.parametrize("name", known_names())
def test_every_config_loads_and_its_family_builds_it(name: str) -> None:
    known = load_known(name)
    family = load_family(known.family)
    assert known.family in FAMILIES
    assert family.published_tensors(known.architecture)
    gate = known.tolerances["fp32"]
    assert (gate.max_abs, gate.cosine) == (1e-4, 0.99999)


@pytest.mark.parametrize("name", [*OPENAI, *HUGGINGFACE])
def test_clip_preparation_fits_the_architecture(name: str) -> None:
    known = load_known(name)
    architecture = ClipArchitecture.from_config(known.architecture)
    assert json.loads(json.dumps(architecture.to_json())) == known.architecture
    assert isinstance(known.image, ImageSpec)
    vision, sizes = architecture.towers
    assert known.image.size_pixels == vision.image_size
    assert (known.image.mean, known.image.std) == (IMAGE_MEAN, IMAGE_STD)
    assert known.text is not None
    assert (known.text.context_length, known.text.vocab_size) == (sizes.context_length, sizes.vocab_size)
    assert known.text.end_token_id == sizes.end_token_id
    assert known.text.cleaning == ("openai" if name in OPENAI else "none")


@pytest.mark.parametrize(("name", "published"), OPENAI.items())
def test_openai_architectures_have_the_published_keys(
    name: str, published: str, manifests: dict[str, dict[str, list[int]]]
) -> None:
    known = load_known(name)
    assert known.source.url == f"https://openaipublic.azureedge.net/clip/models/{known.sha256}/{published}.pt"
    expected = {
        key: tuple(shape) for key, shape in manifests[published].items() if not key.endswith("num_batches_tracked")
    }
    found = ClipFamily().published_tensors(known.architecture)
    assert {key: info.shape for key, info in found.items()} == expected


@pytest.mark.parametrize(("name", "same_as"), HUGGINGFACE.items())
def test_huggingface_architectures_are_the_same_models(name: str, same_as: str) -> None:
    known, openai = load_known(name), load_known(same_as)
    assert known.source.hub == f"openai/{name.removesuffix('-hf')}"
    assert {**known.architecture, "key_names": "openai"} == openai.architecture


def error_of(text: str, name: str = "x") -> str:
    with pytest.raises(InputError) as caught:
        known_from_yaml(name, text)
    return str(caught.value)


def test_minimal_config() -> None:
    known = known_from_yaml("x", MINIMAL)
    assert isinstance(known, KnownCheckpoint)
    assert (str(known.source), known.sha256, known.image) == ("owner/name", None, None)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("title:", "titel:", "did you mean 'title'"),
        ("title: A title", "", "missing"),
        ("hub:", "hubb:", "did you mean 'hub'"),
        ("{hub: owner/name}", "{hub: a/b, url: 'https://x'}", "exactly one"),
        ("{hub: owner/name}", "{file: ../x.pt}", "inside configs/"),
        ("{hub: owner/name}", "[1]", "object"),
        ("max_abs: 0.0001", "max_abs: 1e-4", "0.0001"),
        ("cosine: 0.99999", "cosin: 0.99999", "did you mean 'cosine'"),
        ("family:", "sha256: abc\nfamily:", "sha256"),
        ("family: clip", "family: [", "YAML"),
        ("title: A title", "title: !!python/object/apply:os.getcwd []", "YAML"),
        ("architecture: {}", "architecture: {}\nimage: {size: 3}", "unknown field 'size'"),
    ],
)
def test_malformed_configs(old: str, new: str, cause: str) -> None:
    assert old in MINIMAL
    assert cause in error_of(MINIMAL.replace(old, new))


@pytest.mark.parametrize("name", ["../x", "X", "a/b", ""])
def test_config_names_are_plain(name: str) -> None:
    assert "name" in error_of(MINIMAL, name)


def test_unknown_name() -> None:
    with pytest.raises(UsageError) as caught:
        load_known("clip-rn51")
    assert "clip-rn5" in str(caught.value)


def test_packaged_file_that_is_missing() -> None:
    with pytest.raises(EnvironmentFailure, match="not installed"):
        packaged_path("demo/missing.pt")


def test_unknown_architecture_field() -> None:
    architecture: dict[str, Any] = {**load_known("clip-rn50").architecture, "embed_dims": 3}
    with pytest.raises(InputError, match="embed_dims"):
        ClipArchitecture.from_config(architecture)
