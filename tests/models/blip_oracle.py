"""The BLIP oracle's records, each as calls of Parts: what the eager tests and the tests of graphs both compare.

Every recorded tensor is made here by exactly one way of calling the Parts, whoever runs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

DATA = Path(__file__).parents[1] / "data" / "blip"
VARIANTS = ("caption", "feature_extractor", "retrieval", "vqa")
# In the place of [CLS] or after it: ids of the tiny vocabulary's last two tokens.
DECODER_START, ENCODER_START = 155, 156
# What the runtime makes of logits, not a Part: generated ids and rankings.
BY_THE_RUNTIME = ("output.generated_ids_beam1", "output.generated_ids_beam3", "output.rank_answer_idx_k4")

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Run = Callable[[str, Arrays], Arrays]
"""A Part's name and its inputs by name → its outputs by name."""
Compared = Iterator[tuple[str, Array]]
"""Name of a record and what the Parts give for it."""


def checkpoint_path(variant: str) -> Path:
    (path,) = (DATA / variant).glob("*.pth")
    return path


def read_record(variant: str) -> dict[str, Array]:
    return dict(load_file(DATA / variant / "golden.safetensors"))


def read_meta(variant: str) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((DATA / variant / "meta.json").read_text(encoding="utf-8"))
    return meta


def read_manifests() -> dict[str, dict[str, tuple[int, ...]]]:
    """Kind of file → key → shape, as the original's classes and its retrieval checkpoints have them.

    In the data, a string is a module whose keys follow, and {a-b} in a key stands for each number from a to b.
    """
    data = json.loads((DATA / "manifests.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entries in data["checkpoints"].items():
        found[name] = {}
        for prefix, entry in entries.items():
            module = {"": entry} if isinstance(entry, list) else data["modules"][entry]
            for pattern, shape in module.items():
                found[name] |= dict.fromkeys(_numbered(prefix + pattern), tuple(shape))
    return found


def _numbered(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)-(\d+)\}", pattern)
    if match is None:
        return [pattern]
    return [pattern.replace(match[0], str(i)) for i in range(int(match[1]), int(match[2]) + 1)]


def outputs(variant: str, record: Arrays, run: Run) -> Compared:
    """Every recorded output of a variant at its own image size, as the Parts compute it."""
    tokens = run("vision", {"pixel_values": record["input.image"]})["last_hidden_state"]
    yield "output.image_embeds", tokens
    png = run("vision", {"pixel_values": record["preprocess.image_png"][None]})
    yield "preprocess.image_embeds", png["last_hidden_state"]
    yield from {"caption": _caption, "feature_extractor": _features, "retrieval": _retrieval, "vqa": _vqa}[variant](
        record, run, tokens
    )


def _features(record: Arrays, run: Run, tokens: Array) -> Compared:
    ids, mask = record["input.input_ids"], record["input.attention_mask"]
    yield "output.text_hidden_batch", run("text", text(ids, mask))["last_hidden_state"]
    for row, length in enumerate(mask.sum(axis=1)):
        alone = ids[row : row + 1, :length]
        yield f"output.text_hidden_{row}", run("text", text(alone))["last_hidden_state"]
        inputs = text(starting_with(alone, ENCODER_START)) | {"encoder_hidden_states": tokens[row : row + 1]}
        yield f"output.multimodal_hidden_{row}", run("multimodal_text", inputs)["last_hidden_state"]


def _retrieval(record: Arrays, run: Run, tokens: Array) -> Compared:
    ids, mask = record["input.input_ids"], record["input.attention_mask"]
    image = run("vision", {"pixel_values": record["input.image"]})["image_embeds"]
    yield "output.image_feat", image
    texts = run("text", text(ids, mask))
    yield "output.text_feat", texts["text_embeds"]
    yield "output.text_hidden", texts["last_hidden_state"]
    yield "output.itc_sim", image @ texts["text_embeds"].T
    for name, first in (("cls", ids), ("enc", starting_with(ids, ENCODER_START))):
        inputs = text(first, mask) | {"encoder_hidden_states": tokens}
        yield f"output.itm_logits_{name}", run("multimodal_text", inputs)["itm_logits"]


def _caption(record: Arrays, run: Run, tokens: Array) -> Compared:
    cross = run("cross_key_values", {"encoder_hidden_states": tokens})
    mask = record["input.attention_mask"]
    captions = starting_with(record["input.input_ids"], DECODER_START)
    yield "output.logits_teacher_forced", run("text_decoder", first_step(captions, mask, cross))["logits"]
    prompted = run("text_decoder", first_step(record["input.prompt_ids"], None, cross))
    yield "output.logits_prompt", prompted["logits"]
    yield "output.prompt_past_key_0", prompted["present.0.decoder.key"]
    yield "output.prompt_past_value_0", prompted["present.0.decoder.value"]


def _vqa(record: Arrays, run: Run, tokens: Array) -> Compared:
    states, mask = question_states(record, run, tokens), record["input.attention_mask"]
    yield "output.question_states", states
    cross = run("cross_key_values", {"encoder_hidden_states": states})
    start = np.full((len(states), 1), DECODER_START)
    # The original's generation attends to padding, its ranking does not.
    for name, encoder_mask in (("ones", np.ones_like(mask)), ("pad", mask)):
        logits = run("text_decoder", first_step(start, None, cross, encoder_mask))["logits"]
        yield f"output.first_answer_logits_mask_{name}", logits
    ids, answer_mask = teacher_forced_answers(record)
    yield "output.logits_teacher_forced", run("text_decoder", first_step(ids, answer_mask, cross, mask))["logits"]


def teacher_forced_answers(record: Arrays) -> tuple[Array, Array]:
    """Ids and mask of the answers that belong to the three questions: the last three."""
    return record["input.answer_ids"][4:7], record["input.answer_mask"][4:7]


def question_states(record: Arrays, run: Run, tokens: Array) -> Array:
    questions = starting_with(record["input.input_ids"], ENCODER_START)
    inputs = text(questions, record["input.attention_mask"]) | {"encoder_hidden_states": tokens}
    return run("vqa_encoder", inputs)["last_hidden_state"]


def starting_with(ids: Array, first: int) -> Array:
    """The rows with another first token."""
    return np.concatenate([np.full((len(ids), 1), first), ids[:, 1:]], axis=1)


def text(ids: Array, mask: Array | None = None) -> dict[str, Array]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}


def first_step(
    ids: Array, mask: Array | None, cross: Arrays, encoder_mask: Array | None = None, heads_width: int = 64
) -> dict[str, Array]:
    """The decoder's inputs without a past; `cross` is what `cross_key_values` returned."""
    (batch, heads, tokens, _) = cross["present.0.encoder.key"].shape
    cache = {name.replace("present", "past_key_values"): array for name, array in cross.items()}
    for name in list(cache):
        cache[name.replace("encoder", "decoder")] = np.zeros((batch, heads, 0, heads_width), np.float32)
    ones = np.ones((batch, tokens), np.int64)
    return text(ids, mask) | {"encoder_attention_mask": ones if encoder_mask is None else encoder_mask} | cache


def next_step(inputs: Arrays, outputs: Arrays) -> dict[str, Array]:
    """The decoder's inputs with the cache that a step gave."""
    past = {name.replace("present", "past_key_values"): array for name, array in outputs.items() if name != "logits"}
    return {**inputs, **past}


def decoder_case(variant: str, record: Arrays, run: Run) -> tuple[Array, Array, dict[str, Array]]:
    """Ids and mask of the teacher-forced record, and the decoder's inputs that stay the same at every step."""
    tokens = run("vision", {"pixel_values": record["input.image"]})["last_hidden_state"]
    if variant == "vqa":
        tokens = question_states(record, run, tokens)
    cross = run("cross_key_values", {"encoder_hidden_states": tokens})
    if variant == "vqa":
        ids, mask = teacher_forced_answers(record)
        return ids, mask, first_step(ids, mask, cross, record["input.attention_mask"])
    ids, mask = starting_with(record["input.input_ids"], DECODER_START), record["input.attention_mask"]
    return ids, mask, first_step(ids, mask, cross)


def decode_in_chunks(run: Run, ids: Array, mask: Array, inputs: Arrays, chunks: tuple[int, ...]) -> Array:
    """Logits of all tokens, fed in pieces of those lengths with the cache of the pieces before."""
    fed, logits, step = 0, [], dict(inputs)
    for length in chunks:
        step |= {"input_ids": ids[:, fed : fed + length], "attention_mask": mask[:, : fed + length]}
        found = run("text_decoder", step)
        step = next_step(step, found)
        logits.append(found["logits"])
        fed += length
    return np.concatenate(logits, axis=1)
