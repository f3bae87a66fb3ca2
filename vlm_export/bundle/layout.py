"""File names and side files of a bundle, as transformers, transformers.js, optimum and fastembed read them.

Facts: transformers.js v4 `utils/dtypes.js` (suffixes) and `utils/model-loader.js` (`use_external_data_format`: the
graph's file name → number of data files `<graph>_data`, `<graph>_data_1`, …; `true` counts as 1); transformers 5.23
`CLIPImageProcessor` and `CLIPTokenizer` (configuration keys).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlm_export.bundle.manifest import VariantRecord
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.specs import ImageSpec, TextSpec

GRAPH_DIRECTORY = "onnx"
CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"

PRECISION_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
PART_STEMS = {"vision": "vision_model", "text": "text_model"}
PILLOW_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def graph_path(part: str, precision: str) -> str:
    """Path of a graph relative to the bundle; UsageError for an unknown precision."""
    if precision not in PRECISION_SUFFIXES:
        raise UsageError(f"unknown precision {precision!r}", fix=suggestion(precision, PRECISION_SUFFIXES))
    return f"{GRAPH_DIRECTORY}/{PART_STEMS.get(part, part)}{PRECISION_SUFFIXES[precision]}.onnx"


def external_data_path(graph: str, index: int = 0) -> str:
    """Path of the graph's weight file number `index`, relative to the bundle."""
    return f"{graph}_data" if index == 0 else f"{graph}_data_{index}"


def golden_directory(part: str, index: int) -> str:
    """Directory of one golden input and output set, relative to the bundle (ONNX standard test data)."""
    return f"golden/{part}/test_data_set_{index}"


def preprocessor_config(image: ImageSpec) -> dict[str, Any]:
    """`preprocessor_config.json` for a CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image.size_pixels},
        "resample": PILLOW_RESAMPLE[image.resample],
        "do_center_crop": True,
        "crop_size": {"height": image.size_pixels, "width": image.size_pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }


def hub_config(config: Mapping[str, Any], variants: Iterable[VariantRecord]) -> dict[str, Any]:
    """`config.json`: the family's `config`, and for transformers.js which graphs have external data files."""
    chunks = {variant.file.rpartition("/")[2]: len(variant.external_data) for variant in variants}
    external = {name: count for name, count in sorted(chunks.items()) if count}
    result = {key: value for key, value in config.items() if key != "transformers.js_config"}
    own = dict(config.get("transformers.js_config") or {})
    own.pop("use_external_data_format", None)
    if external:
        own["use_external_data_format"] = external
    return {**result, "transformers.js_config": own} if own else result


def special_tokens(text: TextSpec, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """`special_tokens_map.json` for the data of a `tokenizer.json`.

    A padding id that is an ordinary token (CLIP's 0 is "!") is not named: consumers register what stands here as
    special, and the tokenizer would then split it off wherever a text has it. End-of-text pads as well, because
    nothing after the first one counts.

    Raises:
        InputError: end-of-text is none of the tokenizer's added tokens.
    """
    added = {token["id"]: str(token["content"]) for token in tokenizer.get("added_tokens", ())}
    if text.end_token_id not in added:
        raise InputError(
            "the tokenizer does not fit the model: end-of-text is none of its added tokens",
            where=TOKENIZER_NAME,
            expected=f"id {text.end_token_id}",
            got=f"ids {sorted(added)}",
            fix="pass the tokenizer that was published with the checkpoint",
        )
    end = added[text.end_token_id]
    start = _start_token(tokenizer.get("post_processor"))
    unknown = tokenizer.get("model", {}).get("unk_token") or end
    tokens = {"eos_token": end, "pad_token": added.get(text.pad_token_id, end), "unk_token": unknown}
    return {"bos_token": start, **tokens} if start else tokens


def _start_token(processor: Any) -> str | None:
    """The special token that a post-processor of the `tokenizers` library puts in front of a single text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        found = (_start_token(entry) for entry in processor.get("processors", ()))
        return next((token for token in found if token), None)
    if processor.get("type") == "TemplateProcessing":
        first: Any = next(iter(processor.get("single", ())), {})
        return first["SpecialToken"]["id"] if "SpecialToken" in first else None
    first = processor.get("cls")
    return first[0] if first else None


def tokenizer_config(
    text: TextSpec, tokens: Mapping[str, str], tokenizer_class: str = "CLIPTokenizer"
) -> dict[str, Any]:
    """`tokenizer_config.json`; `tokens` as `special_tokens` gives them."""
    return {"tokenizer_class": tokenizer_class, "model_max_length": text.context_length, **tokens}
