"""BLIP's configs say what the published files are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.models.blip.architecture import BlipArchitecture, architecture_from_checkpoint
from vlm_export.models.blip.family import BlipFamily
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.specs import ImageSpec

oracle = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "models" / "blip_oracle.py")),
)
MANIFESTS: dict[str, dict[str, tuple[int, ...]]] = oracle.read_manifests()
DOWNLOADS = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
# Salesforce's file, and the manifest of its kind.
FINE_TUNED = {
    "model_base_caption_capfilt_large": "caption_base_384",
    "model_large_caption": "caption_large_384",
    "model_base_retrieval_coco": "retrieval_ckpt_base_384",
    "model_base_retrieval_flickr": "retrieval_ckpt_base_384",
    "model_large_retrieval_coco": "retrieval_ckpt_large_384",
    "model_large_retrieval_flickr": "retrieval_ckpt_large_384",
    "model_vqa": "vqa_base_480",
    "model_base_vqa_capfilt_large": "vqa_base_480",
    "model_base_nlvr": "nlvr_base_384",
}
PRETRAINED = {
    "model_base_14M": "base",
    "model_base": "base",
    "model_base_capfilt_large": "base",
    "model_large": "large",
}
# Hugging Face id, and a file of Salesforce of the same kind and size.
HUGGINGFACE = {
    "blip-image-captioning-base": "model_base_caption_capfilt_large",
    "blip-image-captioning-large": "model_large_caption",
    "blip-itm-base-coco": "model_base_retrieval_coco",
    "blip-itm-large-coco": "model_large_retrieval_coco",
    "blip-itm-base-flickr": "model_base_retrieval_flickr",
    "blip-itm-large-flickr": "model_large_retrieval_flickr",
    "blip-vqa-base": "model_vqa",
    "blip-vqa-capfilt-large": "model_base_vqa_capfilt_large",
}


def config_name(file: str) -> str:
    return "blip" + file.removeprefix("model").lower().replace("_", "-")


def architecture_of(manifest: str) -> dict[str, Any]:
    infos = {key: StoredTensorInfo(shape, "float32") for key, shape in MANIFESTS[manifest].items()}
    return architecture_from_checkpoint(Checkpoint(manifest, "state_dict", (), infos, _unread)).to_json()


def _unread(key: str) -> Tensor:
    raise AssertionError(f"{key} was read")


def test_every_published_file_has_its_config() -> None:
    expected = {config_name(file) for file in (*FINE_TUNED, *PRETRAINED)} | {f"{name}-hf" for name in HUGGINGFACE}
    assert {name for name in known_names() if name.startswith("blip-") and "demo" not in name} == expected


@pytest.mark.parametrize(("file", "manifest"), FINE_TUNED.items())
def test_fine_tuned_architectures_are_the_published_ones(file: str, manifest: str) -> None:
    known = load_known(config_name(file))
    assert known.source.url == f"{DOWNLOADS}{file}.pth"
    assert known.architecture == architecture_of(manifest)


@pytest.mark.parametrize(("file", "size"), PRETRAINED.items())
def test_pretrained_architectures_have_all_parts_of_their_size(file: str, size: str) -> None:
    """There is no manifest of their own: they join what the fine-tuned files have one by one."""
    known = load_known(config_name(file))
    assert known.source.url == f"{DOWNLOADS}{file}.pth"
    retrieval, caption = architecture_of(f"itm_{size}_384"), architecture_of(f"caption_{size}_384")
    features = architecture_of(f"feature_extractor_{size}_224")
    expected = {**retrieval, "vision": features["vision"], "decoder": caption["decoder"]}
    assert known.architecture == expected


@pytest.mark.parametrize(("name", "file"), HUGGINGFACE.items())
def test_huggingface_architectures_are_the_same_models(name: str, file: str) -> None:
    known, original = load_known(f"{name}-hf"), load_known(config_name(file)).architecture
    assert known.source.hub == f"Salesforce/{name}"
    # Converted at 384 pixels, with transformers' default epsilon.
    vision = {**original["vision"], "eps": 1e-5, "image_size": 384}
    assert known.architecture == {**original, "key_names": "huggingface", "vision": vision}


@pytest.mark.parametrize("name", [name for name in known_names() if name.startswith("blip-") and "demo" not in name])
def test_preparation_fits_the_architecture(name: str) -> None:
    known = load_known(name)
    architecture = BlipArchitecture.from_config(known.architecture)
    assert json.loads(json.dumps(architecture.to_json())) == known.architecture
    image, text = known.image, known.text
    assert isinstance(image, ImageSpec)
    assert (image.size_pixels, image.resize) == (architecture.vision.image_size, "stretch")
    assert (image.resample, image.rgb_stage, image.mean, image.std) == (
        "bicubic",
        "before_resize",
        IMAGE_MEAN,
        IMAGE_STD,
    )
    assert text is not None
    original = architecture.key_names == "original"
    truncates = original and (architecture.has_matching_head or architecture.answers_questions)
    assert (text.context_length, text.vocab_size) == (35 if truncates else 512, 30524)
    assert (text.end_token_id, text.pad_token_id, text.cleaning) == (102, 0, "none")


def test_a_random_checkpoint_of_a_huggingface_config_is_recognised_by_what_it_publishes() -> None:
    for name in ("blip-image-captioning-base-hf", "blip-itm-large-coco-hf", "blip-vqa-base-hf"):
        known = load_known(name)
        tensors = BlipFamily().published_tensors(known.architecture)
        config = BlipFamily().published_config(known.architecture)
        checkpoint = Checkpoint(name, "random", (), tensors, _unread, config)
        assert BlipFamily().recognises(checkpoint)
        assert architecture_from_checkpoint(checkpoint).to_json() == known.architecture
