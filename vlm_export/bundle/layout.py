"""File names and side files of a bundle, as transformers, transformers.js, optimum and fastembed read them.

Facts: transformers.js v4 `utils/dtypes.js` (suffixes) and `utils/model-loader.js` (`use_external_data_format`: the
graph's file name → number of data files `<graph>_data`, `<graph>_data_1`, …; `true` counts as 1); transformers 5.23
`CLIPImageProcessor` and `SiglipImageProcessor` (configuration keys; transformers.js knows both, but none of BLIP's).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm_export.bundle.manifest import IR_SUFFIX, VariantRecord
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.specs import ImageSpec, PatchSpec

GRAPH_DIRECTORY = "onnx"
IR_DIRECTORY = "openvino"
CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GOLDEN_DIRECTORY = "golden"
CONTRACT_DIRECTORY = f"{GOLDEN_DIRECTORY}/contract"
LEDGER_NAME = "ledger.json"

_PRECISION_NAMES: Mapping[str, tuple[str, str | None]] = {
    "fp32": ("", "fp32"),
    "fp16": ("_fp16", "fp16"),
    "int8": ("_int8", "int8"),
    "int8-static": ("_quantized", "q8"),
    "w8a16": ("_w8a16", None),
    "int4": ("_q4", "q4"),
}
PRECISION_SUFFIXES = {precision: suffix for precision, (suffix, _) in _PRECISION_NAMES.items()}
TRANSFORMERS_JS_DTYPES = {precision: dtype for precision, (_, dtype) in _PRECISION_NAMES.items() if dtype is not None}
"""Precision → the `dtype` by which transformers.js finds its graphs; w8a16 has none, and loads by its file's name."""

PART_STEMS = {"vision": "vision_model", "text": "text_model", "decoder": "decoder_model_merged"}
PILLOW_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def graph_path(part: str, precision: str) -> str:
    """Path of a graph relative to the bundle; UsageError for an unknown precision."""
    return f"{GRAPH_DIRECTORY}/{_graph_stem(part, precision)}.onnx"


def ir_path(part: str, precision: str) -> str:
    """Path of a graph in OpenVINO's own form relative to the bundle; UsageError for an unknown precision."""
    return f"{IR_DIRECTORY}/{_graph_stem(part, precision)}{IR_SUFFIX}"


def _graph_stem(part: str, precision: str) -> str:
    if precision not in PRECISION_SUFFIXES:
        raise UsageError(f"unknown precision {precision!r}", fix=suggestion(precision, PRECISION_SUFFIXES))
    return PART_STEMS.get(part, part) + PRECISION_SUFFIXES[precision]


def json_bytes(data: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """A side file as it is published."""
    return (json.dumps(data, indent=2) + "\n").encode()


def golden_directory(part: str, index: int) -> str:
    """Directory of one golden input and output set, relative to the bundle (ONNX standard test data)."""
    return f"{GOLDEN_DIRECTORY}/{part}/test_data_set_{index}"


def preprocessor_config(image: ImageSpec | PatchSpec) -> dict[str, Any]:
    """`preprocessor_config.json` for a CLIPImageProcessor, or a SiglipImageProcessor where images are only stretched.

    With their Pillow back ends, transformers' classes make the bundle's own pixels of it, but for what
    `preprocessor_differences` says.
    """
    if isinstance(image, PatchSpec):
        kind, steps = "Siglip2ImageProcessor", {"patch_size": image.patch_size, "max_num_patches": image.max_patches}
        return {"image_processor_type": kind, **steps, "do_resize": True, **_values(image)}
    square = {"height": image.size_pixels, "width": image.size_pixels}
    size = square
    if image.resize == "shortest_edge":
        size = {"shortest_edge": image.resize_pixels[0]}
    elif image.resize == "longest_edge":
        size = {"longest_edge": image.resize_pixels[0]}
    elif image.resize == "stretch":
        size = dict(zip(("height", "width"), image.resize_pixels, strict=True))
    only_stretched = image.resize == "stretch" and image.crop == "none"
    crop = {} if only_stretched else {"do_center_crop": image.crop != "none", "crop_size": square}
    return {
        "image_processor_type": "SiglipImageProcessor" if only_stretched else "CLIPImageProcessor",
        "size": size,
        **crop,
        "do_resize": image.resize != "none",
        **_values(image),
    }


def _values(image: ImageSpec | PatchSpec) -> dict[str, Any]:
    return {
        "resample": PILLOW_RESAMPLE[image.resample],
        "do_rescale": True,
        "rescale_factor": image.rescale_factor,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": image.rgb_stage != "never",
    }


def preprocessor_differences(image: ImageSpec | PatchSpec) -> list[str]:
    """Where transformers' classes, reading `preprocessor_config`, make other pixels than the bundle; sentences.

    No class of transformers 5.23 rounds a crop as torchvision does, or converts to RGB after the resize.
    """
    differences = []
    if isinstance(image, ImageSpec):
        if image.crop == "nearest_even":
            differences.append(
                "transformers rounds the offset of the centre crop down, this model's original to the even side: "
                "images whose resized margin is 3 more than a multiple of 4 are cut one pixel apart"
            )
        if image.resize == "longest_edge":
            differences.append(
                "no processor of transformers resizes the longest edge and pads to a square as this model's original "
                "does: prepare images with this bundle's own runtime"
            )
        if image.transparency == "drop":
            differences.append(
                "transformers 5 puts transparent images on white, this model's original drops their alpha"
            )
        if image.rgb_stage == "after_crop":
            differences.append(
                "transformers converts to RGB before the resize, this model's original after the crop: images with a "
                "palette, of one bit a pixel, or with transparency differ"
            )
    differences.append(
        "transformers' default back end resizes with torchvision: on uint8 its values differ from those of Pillow, "
        "with which this bundle resizes, as docs/numerics.md states"
    )
    return differences


def hub_config(config: Mapping[str, Any], variants: Iterable[VariantRecord]) -> dict[str, Any]:
    """`config.json`: the family's `config`, and for transformers.js which graphs have external data files.

    Raises:
        InputError: the config has a `transformers.js_config` that is no object.
    """
    # By the names that it looks for; what a graph shares with another lies in that one's file.
    chunks = {
        variant.file.rpartition("/")[2]: sum(name.startswith(f"{variant.file}_data") for name in variant.external_data)
        for variant in variants
    }
    external = {name: count for name, count in sorted(chunks.items()) if count}
    result = {key: value for key, value in config.items() if key != "transformers.js_config"}
    stated = config.get("transformers.js_config") or {}
    if not isinstance(stated, Mapping):
        raise InputError(
            "config.json is malformed",
            where="config.json: transformers.js_config",
            expected="an object",
            got=repr(stated)[:200],
            fix="correct it, or take it out",
        )
    own = dict(stated)
    own.pop("use_external_data_format", None)
    if external:
        own["use_external_data_format"] = external
    return {**result, "transformers.js_config": own} if own else result
