from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_export.bundle.layout import (
    PREPROCESSOR_NAME,
    external_data_path,
    golden_directory,
    graph_path,
    hub_config,
    preprocessor_config,
    special_tokens,
    tokenizer_config,
)
from vlm_export.bundle.manifest import VariantRecord, checked_relative_name
from vlm_export.errors import InputError, UsageError
from vlm_export.specs import ImageSpec, TextSpec

IMAGE = ImageSpec(224, "bicubic", "after_crop", (0.48145466, 0.4578275, 0.40821073), (0.268, 0.261, 0.275))
TEXT = TextSpec(context_length=77, vocab_size=49408, end_token_id=49407, pad_token_id=0, cleaning="openai")
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(post_processor: Any = None, **model: Any) -> dict[str, Any]:
    added = [{"id": 49406, "content": START, "special": True}, {"id": 49407, "content": END, "special": True}]
    return {"added_tokens": added, "post_processor": post_processor, "model": {"type": "BPE", **model}}


def test_graph_names_are_the_ecosystems() -> None:
    names = [graph_path(part, precision) for part in ("vision", "text") for precision in ("fp32", "fp16", "int8")]
    assert names == [
        "onnx/vision_model.onnx",
        "onnx/vision_model_fp16.onnx",
        "onnx/vision_model_quantized.onnx",
        "onnx/text_model.onnx",
        "onnx/text_model_fp16.onnx",
        "onnx/text_model_quantized.onnx",
    ]
    assert graph_path("resampler", "fp16") == "onnx/resampler_fp16.onnx"
    assert external_data_path(names[0]) == "onnx/vision_model.onnx_data"
    assert external_data_path(names[0], 2) == "onnx/vision_model.onnx_data_2"
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


def test_config_names_the_graphs_with_external_data() -> None:
    variants = [
        VariantRecord("fp32", "onnx/vision_model.onnx", ("onnx/vision_model.onnx_data",)),
        VariantRecord("int8", "onnx/vision_model_quantized.onnx"),
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


@pytest.mark.parametrize(
    ("post_processor", "start"),
    [
        (None, None),
        ({"type": "RobertaProcessing", "sep": [END, 49407], "cls": [START, 49406]}, START),
        ({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": START}}, {"Sequence": {"id": "A"}}]}, START),
        ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}, None),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "Roberta", "cls": [START, 1]}]}, START),
    ],
)
def test_special_tokens(post_processor: Any, start: str | None) -> None:
    tokens = special_tokens(TEXT, tokenizer(post_processor))
    assert tokens.get("bos_token") == start
    assert tokens["eos_token"] == END
    # Id 0 is "!" in CLIP's vocabulary; made special, every "!" in a text would become another id.
    assert tokens["pad_token"] == END
    assert tokens["unk_token"] == END
    config = tokenizer_config(TEXT, tokens)
    assert config["tokenizer_class"] == "CLIPTokenizer"
    assert config["model_max_length"] == 77


def test_a_padding_token_of_its_own_is_named() -> None:
    data = tokenizer(unk_token="[UNK]")
    data["added_tokens"].append({"id": 0, "content": "[PAD]", "special": True})
    tokens = special_tokens(TEXT, data)
    assert (tokens["pad_token"], tokens["unk_token"]) == ("[PAD]", "[UNK]")


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(InputError, match=r"does not fit the model[\s\S]*id 49407[\s\S]*ids \[5\]"):
        special_tokens(TEXT, {"added_tokens": [{"id": 5, "content": "x"}]})
