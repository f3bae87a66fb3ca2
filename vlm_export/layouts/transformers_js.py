"""transformers.js and optimum: the bundle itself, with both encoders in one more graph, `onnx/model.onnx`.

Facts: transformers.js 4.3.2, `src/models/session_config.js` (one session named "model" for CLIPModel, SiglipModel and
what has their interface), `src/utils/dtypes.js` (suffixes; without a `dtype` browsers ask for `_quantized`) and
`src/utils/model-loader.js` (it loads data files of a graph's own name and no others, so that a combined graph cannot
read those of its towers); optimum-onnx 0.1, `ORTModelForZeroShotImageClassification` (the same file, outputs by name)
and `onnxruntime/modeling.py` (of a directory ONNX Runtime opens whatever data files a graph names; from the Hub only
`<file>_data` is downloaded).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vlm_export.bundle import layout
from vlm_export.layouts.consumer_graph import ConsumerGraph, also_named, in_order, paired
from vlm_export.layouts.packing import Packing
from vlm_export.runtime.inputs.chat_prompt import PromptForm
from vlm_export.specs.tasks import ChatSpec, EmbedSpec

PART = "model"
_OPTIMUM = "optimum"
_INPUTS = ("input_ids", "pixel_values", "attention_mask")
_OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
_QUESTION = "\0"  # in no prompt's own words
_READ_LAST_MESSAGE = (
    "{%- set content = messages[-1]['content'] -%}{%- set found = namespace(image=false, text='') -%}"
    "{%- if content is string -%}{%- set found.text = content -%}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{%- set found.image = true -%}"
    "{%- else -%}{%- set found.text = found.text + part['text'] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
)
_POOLED = "pooler_output"
_SETTINGS = "transformers.js_config"
_BROWSER_PRECISION = "int8-static"


def lay_out_for_dtypes(packing: Packing) -> None:
    """As `lay_out`, for transformers.js, which finds graphs by a dtype; InputError where it has none for these."""
    if packing.precision not in layout.TRANSFORMERS_JS_DTYPES:
        known = ", ".join(layout.TRANSFORMERS_JS_DTYPES)
        raise packing.refusal(f"a precision that it has a dtype for: {known}", packing.precision)
    lay_out(packing)


def lay_out(packing: Packing) -> None:
    """The bundle's own files, the combined graph where the bundle scores texts against images, and its config."""
    packing.copy_side_files()
    task = packing.bundle.manifest.task(EmbedSpec)
    score = None if task is None else task.score
    towers = _towers(packing) if score is not None and score.activation == "sigmoid" else {}
    for part in packing.bundle.manifest.parts:
        if part.name not in towers:
            packing.keep(part)
            continue
        for variant in part.variants:
            graph = also_named(towers[part.name](variant.precision), _POOLED)
            packing.add(part.name, variant.file, graph, variant.precision)
    if score is not None:
        _check_type(packing)
        graph = paired(packing.text(), packing.image(), score)
        names = tuple(name for name in _INPUTS if name in graph.signature.input_names)
        _add_combined(packing, in_order(graph, names, _OUTPUTS))
        packing.told_cleaning()
    talk = packing.bundle.manifest.task(ChatSpec)
    if talk is not None and layout.TOKENIZER_CONFIG_NAME in packing.bundle.manifest.files:
        stated = {**packing.json(layout.TOKENIZER_CONFIG_NAME), "chat_template": chat_template(talk)}
        packing.write_json(layout.TOKENIZER_CONFIG_NAME, stated)
        if talk.layout == "tiles":
            packing.notes.append("the chat template writes the prompt of one image that is not cut into tiles")
        if talk.layout == "prepended":
            packing.notes.append(
                f"{packing.consumer} puts an image's features in the place of a token, and this model's prompt has "
                "none: ask it with vlm_export.load, or run its three graphs"
            )
    variants = [variant for part in packing.parts for variant in part.variants]
    config = layout.hub_config(packing.json(layout.CONFIG_NAME), variants)
    packing.write_json(layout.CONFIG_NAME, _with_dtype(config, packing))


def _add_combined(packing: Packing, graph: ConsumerGraph) -> None:
    """Both encoders in one graph, whose weights lie in the towers' files where the consumer finds them there."""
    file = layout.graph_path(PART, packing.precision)
    if packing.consumer != _OPTIMUM:
        packing.tell_second_copy(file, graph)
        packing.add(PART, file, graph)
        return
    packing.add(PART, file, graph, shares_weights=True)
    others = [name for name in packing.parts[-1].variants[0].external_data if not name.startswith(file)]
    if others:
        packing.notes.append(
            f"{file} reads weights in {' and '.join(others)}, so that they are there once: keep the files together. "
            "From a Hub repository optimum downloads model.onnx_data alone; package for transformers.js for that"
        )


def chat_template(spec: ChatSpec) -> str:
    """The Jinja template of a question in the last message, about its image where it has one."""
    form = PromptForm(spec)
    with_image = form.text(_QUESTION, [(1, 1)])
    alone = with_image if spec.layout == "prepended" else form.text(_QUESTION, [])
    before, after = with_image.split(_QUESTION)
    start = f"({json.dumps(before)} if found.image else {json.dumps(alone.split(_QUESTION)[0])})"
    return f"{_READ_LAST_MESSAGE}{{{{- {start} + found.text + {json.dumps(after)} -}}}}"


def _check_type(packing: Packing) -> None:
    """Refuses, or tells, what follows from a config.json that no class of transformers reads."""
    contract = packing.bundle.manifest.export.contract
    if contract is None or any(check.get("stage") == "AutoConfig" for check in contract.get("checks", ())):
        return
    kind = packing.json(layout.CONFIG_NAME).get("model_type")
    if packing.consumer == _OPTIMUM:
        raise packing.refusal("a config.json of a type that transformers knows", repr(kind))
    packing.notes.append(
        f"transformers.js takes the score of its zero-shot pipeline from the type of the config, and {kind!r} is none "
        "with both encoders there: run onnx/model.onnx itself, whose logits are the model's"
    )


def _towers(packing: Packing) -> Mapping[str, Callable[[str], ConsumerGraph]]:
    """Both encoders by their parts' names; transformers' classes that score by a sigmoid call embeddings `_POOLED`."""
    task = packing.embed
    pairs = ((task.image, packing.image), (task.text, packing.text))
    return {encoder.part: graph for encoder, graph in pairs if encoder is not None and encoder.output != _POOLED}


def _with_dtype(config: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """The dtype that a browser is to take, where not every graph has the 8-bit form that it asks for by itself."""
    dtype = layout.TRANSFORMERS_JS_DTYPES.get(packing.precision)
    found = [[variant.precision for variant in part.variants] for part in packing.parts]
    if dtype is None or all(_BROWSER_PRECISION in precisions for precisions in found):
        return config
    return {**config, _SETTINGS: {**config.get(_SETTINGS, {}), "dtype": dtype}}
