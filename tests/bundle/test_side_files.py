from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_export.bundle.layout import (
    PREPROCESSOR_NAME,
    golden_directory,
    graph_path,
    hub_config,
    preprocessor_config,
)
from vlm_export.bundle.manifest import VariantRecord, checked_relative_name
from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import torchvision_image_spec

IMAGE = torchvision_image_spec(224, "bicubic", "after_crop", (0.48145466, 0.4578275, 0.40821073), (0.268, 0.261, 0.275))


def test_graph_names_are_the_ecosystems() -> None:
    names = [graph_path(part, precision) for part in ("vision", "text") for precision in ("fp32", "fp16", "int8")]
    assert names == [
        "onnx/vision_model.onnx",
        "onnx/vision_model_fp16.onnx",
        "onnx/vision_model_int8.onnx",
        "onnx/text_model.onnx",
        "onnx/text_model_fp16.onnx",
        "onnx/text_model_int8.onnx",
    ]
    assert graph_path("resampler", "fp16") == "onnx/resampler_fp16.onnx"
    assert checked_relative_name(golden_directory("vision", 0), "") == "golden/vision/test_data_set_0"
    with pytest.raises(UsageError, match="did you mean 'fp16'"):
        graph_path("vision", "f16")


def test_transformers_reads_the_preprocessor_config(tmp_path: Path) -> None:
    # Here and not above: with torch in the process, the tests that fork would be slower.
    from transformers import CLIPImageProcessor

    (tmp_path / PREPROCESSOR_NAME).write_text(json.dumps(preprocessor_config(IMAGE)))
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert dict(processor.size) == {"shortest_edge": 224}
    assert dict(processor.crop_size) == {"height": 224, "width": 224}
    assert int(processor.resample) == 3
    assert tuple(processor.image_mean) == IMAGE.mean
    assert tuple(processor.image_std) == IMAGE.std
    assert processor.rescale_factor == 1 / 255
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    assert [getattr(processor, step) for step in steps] == [True] * 5


def test_transformers_reads_the_stretching_one_and_gives_our_pixels(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    spec = torchvision_image_spec(20, "bicubic", "before_resize", IMAGE.mean, IMAGE.std, "stretch")
    config = preprocessor_config(spec)
    assert config["size"] == {"height": 20, "width": 20}
    assert not {"do_center_crop", "crop_size"} & set(config)
    (tmp_path / PREPROCESSOR_NAME).write_text(json.dumps(config))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor).__name__ == "SiglipImageProcessorPil"
    pixels = np.random.default_rng(0).integers(0, 256, (31, 57, 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[:1, :1]), Image.fromarray(pixels[:, :, 0])):
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.abs(preprocess_image(image, spec) - theirs).max() <= 1e-6


def test_config_names_the_graphs_with_external_data() -> None:
    variants = [
        VariantRecord("fp32", "onnx/vision_model.onnx", ("onnx/vision_model.onnx_data",)),
        VariantRecord("int8", "onnx/vision_model_int8.onnx"),
        VariantRecord("fp32", "onnx/text_model.onnx", ("onnx/text_model.onnx_data", "onnx/text_model.onnx_data_1")),
    ]
    config = hub_config({"model_type": "clip"}, variants)
    assert config == {
        "model_type": "clip",
        "transformers.js_config": {"use_external_data_format": {"text_model.onnx": 2, "vision_model.onnx": 1}},
    }
    assert hub_config({"model_type": "clip"}, variants[1:2]) == {"model_type": "clip"}


def test_config_of_the_source_keeps_its_other_settings() -> None:
    source = {"transformers.js_config": {"dtype": "fp16", "use_external_data_format": True}, "model_type": "clip"}
    expected = {"model_type": "clip", "transformers.js_config": {"dtype": "fp16"}}
    assert hub_config(source, [VariantRecord("fp32", "onnx/a.onnx")]) == expected
    assert source["transformers.js_config"] == {"dtype": "fp16", "use_external_data_format": True}
    assert hub_config({"transformers.js_config": None}, []) == {}
    for odd in (5, "x", ["dtype"]):
        with pytest.raises(InputError, match=r"config\.json is malformed") as caught:
            hub_config({"transformers.js_config": odd}, [])
        assert "transformers.js_config" in caught.value.where
