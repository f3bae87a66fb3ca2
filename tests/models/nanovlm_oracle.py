"""nanoVLM's oracle: models of its checkpoints, each record as a call of a Part, and a plain loop over the Parts.

For test modules of several areas, which load this file with `runpy`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from vlm_export.family import Model, Part, reference_from_module
from vlm_export.specs.tasks import ChatSpec

DATA = Path(__file__).parents[1] / "data" / "nanovlm"
VARIANTS = ("222m", "450m", "split")
Array = npt.NDArray[Any]
ALL_LOGITS: npt.NDArray[np.int64] = np.array(0)
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Runs = Mapping[str, Run]


class Case(NamedTuple):
    """A recorded output, and the Part, inputs and output that must give it."""

    record: str
    part: str
    inputs: dict[str, Array]
    output: str
    expected: Array


class Prompt(NamedTuple):
    """One row: token ids, and the features of its image or tiles, in order."""

    ids: Array
    features: Array


def golden(variant: str) -> dict[str, Array]:
    return dict(load_file(DATA / variant / "golden.safetensors"))


def part_of(model: Model, name: str) -> Part:
    return next(part for part in model.parts if part.name == name)


def eager(model: Model) -> dict[str, Run]:
    return {part.name: reference_from_module(part) for part in model.parts}


def record_prompt(model: Model, runs: Runs, variant: str) -> Prompt:
    records = golden(variant)
    features = runs["vision_encoder"]({"pixel_values": records["input.pixel_values"]})["image_features"]
    return Prompt(records["input.input_ids"][0], features.reshape(-1, features.shape[-1]))


def embedded(model: Model, runs: Runs, prompt: Prompt) -> Array:
    """float32 (T, D): features before the text, or in the places of the placeholders."""
    embeds: Array = runs["embed_tokens"]({"input_ids": prompt.ids[None]})["inputs_embeds"][0].copy()
    chat = model.task(ChatSpec)
    assert chat is not None
    if chat.layout == "prepended":
        return np.concatenate([prompt.features, embeds])
    embeds[prompt.ids == chat.image_token_id] = prompt.features
    return embeds


def decoder_inputs(model: Model, rows: Sequence[Array]) -> dict[str, Array]:
    """Rows (T_i, D) as one batch, padded on the left, with an empty cache."""
    longest = max(len(row) for row in rows)
    embeds = np.stack([np.pad(row, ((longest - len(row), 0), (0, 0))) for row in rows])
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows]).astype(np.int64)
    cache = {
        spec.name: np.zeros(spec.concrete_shape({"batch": len(rows), "past_sequence": 0}), np.float32)
        for spec in part_of(model, "decoder").signature.inputs[4:]
    }
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "num_logits_to_keep": ALL_LOGITS,
        **cache,
    }


def next_inputs(inputs: Mapping[str, Array], outputs: Mapping[str, Array], embeds: Array) -> dict[str, Array]:
    """The decoder's inputs for one more token of each row: embeds float32 (B, 1, D)."""
    mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
    cache = {name.replace("present", "past_key_values"): a for name, a in outputs.items() if name != "logits"}
    positions = inputs["position_ids"][:, -1:] + 1
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "num_logits_to_keep": ALL_LOGITS,
        **cache,
    }


def generate(model: Model, runs: Runs, prompts: Sequence[Prompt], tokens: int, *, cached: bool = True) -> Array:
    """Greedy ids int64 (B, tokens): with the cache, or every time from the beginning."""
    rows = [embedded(model, runs, prompt) for prompt in prompts]
    inputs = decoder_inputs(model, rows)
    ids: list[Array] = []
    for _ in range(tokens):
        outputs = runs["decoder"](inputs)
        ids.append(outputs["logits"][:, -1].argmax(-1))
        embeds = runs["embed_tokens"]({"input_ids": ids[-1][:, None]})["inputs_embeds"]
        if cached:
            inputs = next_inputs(inputs, outputs, embeds)
        else:
            rows = [np.concatenate([row, new]) for row, new in zip(rows, embeds, strict=True)]
            inputs = decoder_inputs(model, rows)
    return np.stack(ids, axis=1)


def cases(model: Model, variant: str) -> list[Case]:
    """Every record that is an output of a Part; the decoder runs on the recorded embeddings."""
    records = golden(variant)
    found = []
    for name in ("random", "image"):
        pixels = records["input.random_pixels" if name == "random" else "input.pixel_values"]
        expected = records[f"output.mp_{name}"]
        found.append(Case(f"output.mp_{name}", "vision_encoder", {"pixel_values": pixels}, "image_features", expected))
    inputs = decoder_inputs(model, list(records["output.combined_embeds"]))
    case = partial(Case, part="decoder", inputs=inputs)
    found.append(case("output.logits", output="logits", expected=records["output.logits"]))
    if "output.kv0_key" in records:
        found += [
            case(f"output.kv0_{what}", output=f"present.0.{what}", expected=records[f"output.kv0_{what}"])
            for what in ("key", "value")
        ]
    return found


def read_manifests() -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of a config → published key → shape; layers, which are all alike, are stored once with their number."""
    stored = json.loads(gzip.decompress((DATA / "published.json.gz").read_bytes()))
    manifests: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in stored.items():
        manifests[name] = {}
        for key, shape in entry["tensors"].items():
            numbers = range(entry["layers"][key.partition(".")[0]]) if "{i}" in key else (0,)
            manifests[name] |= {key.replace("{i}", str(i)): tuple(shape) for i in numbers}
    return manifests
