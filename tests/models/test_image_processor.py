"""Processor files of Hugging Face checkpoints, against transformers' own AutoImageProcessor over odd images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_export.bundle.layout import preprocessor_config, preprocessor_differences
from vlm_export.errors import InputError, UsageError
from vlm_export.family import Checkpoint
from vlm_export.models.reading.image_processor import (
    CLASS_DEFAULTS,
    IMAGE_PROCESSOR_FILE,
    PROCESSOR_FILE,
    assumed_preparation,
    transformers_image,
    with_chosen_size,
)
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.proof.image_samples import original_pixel_values
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import ImageSpec, Origins, torchvision_image_spec

SIZE = 32
SECTION = f"{PROCESSOR_FILE}: image_processor."
SQUARE = {"height": SIZE, "width": SIZE}
RGB = {"do_convert_rgb": True}
FITTING: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng([width, height]).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def odd_images() -> list[Image.Image]:
    """Margins of 0 to 3 mod 4 in both directions, every mode that files have, tiny and very wide."""
    margins = [noise(SIZE + d, SIZE) for d in range(5)] + [noise(SIZE, SIZE + d) for d in range(1, 5)]
    transparent = noise(40, 35, 4)
    palette = noise(43, 36).quantize(17)
    palette.info["transparency"] = 3
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 700, (35, 44)).astype(np.uint16))
    modes = [noise(45, 34).convert(mode) for mode in ("L", "1", "CMYK", "P", "YCbCr")]
    return [
        *margins,
        noise(1, 1),
        noise(300, 3),
        noise(3, 70),
        transparent,
        transparent.convert("LA"),
        palette,
        deep,
        *modes,
    ]


def save(folder: Path, files: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **(config or {})}))
    paths = {name: folder / name for name in files}
    return Checkpoint("x", "hf_directory", (), {}, lambda key: torch.empty(0), config or {}, paths)


def read(checkpoint: Checkpoint, size: int = SIZE, family: str = "CLIPImageProcessor") -> tuple[ImageSpec, Origins]:
    return transformers_image(checkpoint, family, size, "config.json: vision_config.image_size")


def originals(folder: Path) -> Any:
    """The library's own processor, as it chooses class and file, with its Pillow back end."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def assert_equal(spec: ImageSpec, processor: Any, images: list[Image.Image]) -> None:
    for image in images:
        expected = processor(images=[image], return_tensors="np")["pixel_values"][0].astype(np.float32)
        for ours in (preprocess_image(image, spec), original_pixel_values(image, spec)):
            assert ours.shape == expected.shape == (3, SIZE, SIZE)
            assert np.abs(ours - expected).max() == 0.0, (image.mode, image.size)


STATED: dict[str, dict[str, Any]] = {
    "as published in 2021": {"size": SIZE, "crop_size": SIZE, "feature_extractor_type": "CLIPFeatureExtractor"},
    "shortest edge above the crop": {**FITTING, "size": {"shortest_edge": 41}},
    "shortest edge below the crop": {**FITTING, "size": {"shortest_edge": 21}},
    "stretched": {"size": SQUARE, "do_center_crop": False},
    "stretched, then cropped": {"size": [37, 49], "crop_size": [SIZE, SIZE]},
    "a number that becomes a square": {"size": 36, "default_to_square": True, "crop_size": SIZE},
    "no resize": {**FITTING, "do_resize": False},
    "null is off": {**FITTING, "do_resize": None},
    "nearest": {**FITTING, "resample": 0},
    "lanczos": {**FITTING, "resample": 1},
    "bilinear": {**FITTING, "resample": 2},
    "bilinear by name": {**FITTING, "resample": "bilinear"},
    "box": {**FITTING, "resample": 4},
    "hamming": {**FITTING, "resample": 5},
    "other mean": {**FITTING, "image_mean": [0.5, 0.25, 0], "image_std": [0.5, 0.25, 1]},
    "one mean for all": {**FITTING, "image_mean": 0.5, "image_std": 0.25},
    "no normalisation": {**FITTING, "do_normalize": False, "image_mean": None},
    "no rescale": {**FITTING, "do_rescale": False},
    "bytes": {**FITTING, "do_rescale": False, "do_normalize": False},
    "another factor": {**FITTING, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1},
    "BLIP's class": {"image_processor_type": "BlipImageProcessorFast", "size": SIZE},
    "SigLIP's class": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    "DeiT's class": {
        "image_processor_type": "DeiTImageProcessor",
        "size": 48,
        "crop_size": SIZE,
        "do_convert_rgb": True,
    },
    "unknown fields": {**FITTING, "device": "cpu", "do_flip": True, "processor_class": "CLIPProcessor"},
}


@pytest.mark.parametrize("name", STATED)
def test_pixels_are_those_of_the_librarys_own_processor(tmp_path: Path, name: str) -> None:
    stated = STATED[name]
    stated = stated if "feature_extractor_type" in stated else {"image_processor_type": "CLIPImageProcessor", **stated}
    spec, origins = read(save(tmp_path / "model", {IMAGE_PROCESSOR_FILE: stated}))
    assert_equal(spec, originals(tmp_path / "model"), odd_images())
    assert set(origins.values) == {f"image.{field}" for field in spec.to_json()}
    # What the bundle publishes means the same to the library.
    save(tmp_path / "published", {IMAGE_PROCESSOR_FILE: preprocessor_config(spec)})
    assert_equal(spec, originals(tmp_path / "published"), odd_images())


@pytest.mark.parametrize(
    ("files", "where", "ignored"),
    [
        (
            {PROCESSOR_FILE: {"image_processor": {**FITTING, "image_mean": 0.25}}},
            SECTION,
            (),
        ),
        (
            {
                PROCESSOR_FILE: {"image_processor": {**FITTING, "image_mean": 0.25}},
                IMAGE_PROCESSOR_FILE: {**FITTING, "image_mean": 0.75},
            },
            SECTION,
            (IMAGE_PROCESSOR_FILE,),
        ),
        (
            {
                PROCESSOR_FILE: {"processor_class": "CLIPProcessor"},
                IMAGE_PROCESSOR_FILE: {**FITTING, "image_mean": 0.75},
            },
            f"{IMAGE_PROCESSOR_FILE}: ",
            (),
        ),
    ],
    ids=["processor_config", "both", "a processor_config without images"],
)
def test_the_file_counts_that_counts_for_the_library(
    tmp_path: Path, files: dict[str, Any], where: str, ignored: tuple[str, ...]
) -> None:
    spec, origins = read(save(tmp_path / "model", files))
    assert_equal(spec, originals(tmp_path / "model"), odd_images()[:3])
    assert origins.values["image.mean"] == f"{where}image_mean"
    assert origins.values["image.std"] == "default of CLIPImageProcessor"
    assert tuple(origins.ignored_files) == ignored


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_defaults_are_those_of_the_class(name: str) -> None:
    import transformers

    processor = getattr(transformers, f"{name}Pil")()
    for key in {*CLASS_DEFAULTS[name], "do_center_crop", "crop_size", "do_convert_rgb", "do_pad"}:
        expected, ours = getattr(processor, key, None), CLASS_DEFAULTS[name].get(key)
        if key in ("size", "crop_size") and expected is not None:
            expected = dict(expected)
        if key in ("image_mean", "image_std"):
            expected = list(getattr(processor, key))
        # What is not stated is off, and a number becomes a square.
        assert expected == ours or (ours is None and (not expected or key == "default_to_square")), key
    assert CLASS_DEFAULTS[name].get("default_to_square", True) == processor.default_to_square


def test_without_a_file_the_librarys_defaults_are_named(tmp_path: Path) -> None:
    spec, origins = read(save(tmp_path / "model", {}))
    assert (spec.resize, spec.resize_pixels, spec.crop, spec.resample) == ("shortest_edge", (SIZE,), "down", "bicubic")
    assert (spec.mean, spec.std) == (IMAGE_MEAN, IMAGE_STD)
    assert origins.values["image.mean"] == "default of CLIPImageProcessor"
    assert origins.values["image.size_pixels"] == "config.json: vision_config.image_size"
    blip, _ = read(save(tmp_path / "blip", {}), family="BlipImageProcessor")
    assert (blip.resize, blip.resize_pixels, blip.crop) == ("stretch", (SIZE, SIZE), "none")


@pytest.mark.parametrize(
    ("stated", "key"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "ViTImageProcesor"}, "image_processor_type"),
        ({"image_processor_type": 3}, "image_processor_type"),
        ({**FITTING, "resample": "bicubic"}, "resample"),
        ({**FITTING, "resample": 6}, "resample"),
        ({**FITTING, "resample": True}, "resample"),
        ({**FITTING, "resample": None}, "resample"),
        ({**FITTING, "size": None}, "size"),
        ({**FITTING, "size": True}, "size"),
        ({**FITTING, "size": {"longest_edge": 32}}, "size"),
        ({**FITTING, "size": {"shortest_edge": 32, "longest_edge": 64}}, "size"),
        ({**FITTING, "size": {"shortest_edge": 10**9}}, "size"),
        ({**FITTING, "size": {"shortest_edge": "32"}}, "size"),
        ({"size": {"height": 32, "width": 48}, "do_center_crop": False}, "size"),
        ({"size": 40, "do_center_crop": False}, "size"),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"shortest_edge": SIZE}}, "size"),
        ({**FITTING, "crop_size": {"shortest_edge": 32}}, "crop_size"),
        ({**FITTING, "crop_size": {"height": 32, "width": 24}}, "crop_size"),
        ({**FITTING, "crop_size": None}, "crop_size"),
        ({}, "crop_size"),
        ({**FITTING, "do_pad": True, "pad_size": SQUARE}, "do_pad"),
        ({**FITTING, "do_normalize": 1}, "do_normalize"),
        ({**FITTING, "image_mean": None}, "image_mean"),
        ({**FITTING, "image_mean": [0.5]}, "image_mean"),
        ({**FITTING, "image_mean": [True, 0, 0]}, "image_mean"),
        ({**FITTING, "image_mean": [1e300, 0, 0]}, "image_mean"),
        ({**FITTING, "image_std": [1, 0, 1]}, "image_std"),
        ({**FITTING, "image_std": 1e-300}, "image_std"),
        ({**FITTING, "rescale_factor": None}, "rescale_factor"),
        ({**FITTING, "rescale_factor": 0}, "rescale_factor"),
        ({**FITTING, "rescale_factor": "1/255"}, "rescale_factor"),
        ({**FITTING, "use_square_size": True}, "use_square_size"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(tmp_path: Path, stated: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        read(save(tmp_path / "model", {PROCESSOR_FILE: {"image_processor": stated}}))
    place = f"{PROCESSOR_FILE}: image_processor.{key}" if stated else "default of CLIPImageProcessor"
    assert caught.value.where == place
    assert caught.value.expected
    assert caught.value.got


def test_a_shortest_edge_without_a_crop_is_the_files_fault(tmp_path: Path) -> None:
    """Any image but a square would come out in a shape that the model does not take."""
    stated = {"size": {"shortest_edge": SIZE}, "do_center_crop": False}
    with pytest.raises(InputError, match="the image encoder takes squares"):
        read(save(tmp_path / "model", {PROCESSOR_FILE: {"image_processor": stated}}))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        '{"image_mean": [NaN, 0, 0]}',
        '{"image_mean": [1], "image_mean": [1]}',
        '{"image_processor": 3}',
    ],
    ids=lambda text: text[:30],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"processor_config\.json is malformed") as caught:
        read(save(tmp_path / "model", {PROCESSOR_FILE: text}))
    assert len(str(caught.value)) < 1000


def test_images_that_the_original_refuses_are_refused(tmp_path: Path) -> None:
    """Without conversion to RGB, transformers fails on all other modes."""
    as_it_is = {"image_processor_type": "ViTImageProcessor", "size": SIZE}
    spec, _ = read(save(tmp_path / "vit", {IMAGE_PROCESSOR_FILE: as_it_is}))
    assert spec.rgb_stage == "never"
    assert_equal(spec, originals(tmp_path / "vit"), [noise(40, 30)])
    with pytest.raises(InputError, match="RGB alone"):
        preprocess_image(noise(40, 30).convert("L"), spec)
    with pytest.raises(ValueError, match="mean must have"):
        originals(tmp_path / "vit")(images=[noise(40, 30).convert("L")])


def test_another_size_follows_only_where_it_is_defined(tmp_path: Path) -> None:
    prepared = read(save(tmp_path / "model", {IMAGE_PROCESSOR_FILE: FITTING}))
    spec, origins = with_chosen_size(prepared, 48)
    assert (spec.size_pixels, spec.resize_pixels) == (48, (48,))
    assert origins.values["image.size_pixels"] == "--image-size"
    assert with_chosen_size(prepared, SIZE) == prepared
    larger = read(save(tmp_path / "model", {IMAGE_PROCESSOR_FILE: {**FITTING, "size": {"shortest_edge": 40}}}))
    with pytest.raises(UsageError, match="another image size"):
        with_chosen_size(larger, 48)


def test_where_the_published_file_cannot_say_what_torchvision_does_it_is_said(tmp_path: Path) -> None:
    spec = torchvision_image_spec(SIZE, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD)
    save(tmp_path / "published", {IMAGE_PROCESSOR_FILE: preprocessor_config(spec)})
    processor, differing = originals(tmp_path / "published"), []
    for margin in range(12):
        image = noise(SIZE + margin, SIZE)
        theirs = processor(images=[image], return_tensors="np")["pixel_values"][0]
        if np.abs(preprocess_image(image, spec) - theirs).max() > 0:
            differing.append(margin)
    assert differing == [3, 7, 11]
    said = " ".join(preprocessor_differences(spec))
    assert "3 more than a multiple of 4" in said
    assert "drops their alpha" in said
    assert "after the crop" in said


def test_the_librarys_default_back_end_differs_as_the_documentation_says() -> None:
    """torchvision's resize: one level, but for images more than twice as tall as wide (docs/numerics.md)."""
    from transformers import CLIPImageProcessor

    steps: dict[str, Any] = {"do_normalize": False, "do_rescale": False}
    for resample, tall in ((2, 1), (3, 22)):
        default = CLIPImageProcessor(resample=resample, **steps)
        spec = read_bytes_spec(resample)
        for image, bound in ((noise(640, 427), 1), (noise(224, 300), 1), (noise(90, 70), 1), (noise(250, 1000), tall)):
            theirs = default(images=[image], return_tensors="np")["pixel_values"][0].astype(np.float32)
            levels = np.abs(preprocess_image(image, spec) - theirs)
            assert levels.max() <= bound, (resample, image.size)
            # Where nothing is resized, there is no difference at all.
            assert levels.max() > 0 or image.size != (640, 427)
            assert levels.max() == 0 or image.size != (224, 300)
            assert (levels > 0).mean() < (0.02 if bound == 1 and image.height < 1000 else 0.35)


def read_bytes_spec(resample: int) -> ImageSpec:
    """224 pixels, neither rescaled nor normalised."""
    checkpoint = Checkpoint("x", "hf_directory", (), {}, lambda key: torch.empty(0))
    spec, _ = transformers_image(checkpoint, "CLIPImageProcessor", 224, "the test")
    plain: dict[str, Any] = {"rescale_factor": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return replace(spec, resample="bilinear" if resample == 2 else "bicubic", **plain)


@pytest.mark.parametrize(
    ("origin", "format_", "warns"),
    [
        ("default of CLIPImageProcessor", "hf_directory", True),
        ("default of Siglip2ImageProcessor", "hf_directory", True),
        ("default of CLIPImageProcessor", "random", False),
        ("default of open_clip", "safetensors", False),
        ("preprocessor_config.json: image_mean", "hf_directory", False),
    ],
)
def test_a_preparation_that_no_file_states_is_told(origin: str, format_: Any, warns: bool) -> None:
    """A class whose images keep their shape has no field for the resize."""
    checkpoint = Checkpoint("x", format_, (), {}, lambda key: pytest.fail(key))
    origins = Origins({f"image.{field}": origin for field in ("resample", "mean", "std")})
    assert len(assumed_preparation(checkpoint, origins)) == warns
    assert not assumed_preparation(checkpoint, Origins({**origins.values, "image.std": "config.json: image_std"}))
    assert not assumed_preparation(checkpoint, Origins())
