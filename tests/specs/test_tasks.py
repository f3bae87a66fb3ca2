"""Tasks travel through JSON, are read strictly, and say which parts and token ids they need."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from vlm_export.errors import InputError
from vlm_export.specs.tasks import (
    AnswerSpec,
    CaptionSpec,
    ChatSpec,
    EmbedSpec,
    EncoderSpec,
    FeatureSpec,
    MatchSpec,
    PromptSpec,
    SamplingSpec,
    ScoreSpec,
    SpecialTokens,
    TaskSpec,
    limited_tasks,
)

TOKENS = SpecialTokens(cls=101, sep=102, pad=0, decoder_start=155, encoder_start=156)
EMBED = EmbedSpec(EncoderSpec("vision", "image_embeds"), EncoderSpec("text", "text_embeds"), ScoreSpec("softmax", 4.6))
MATCH = MatchSpec(TOKENS, first_token="cls", max_text_tokens=35)
CAPTION = CaptionSpec(TOKENS, prompt="a picture of ", beams=3, max_length=20, min_length=5)
ANSWER = AnswerSpec(
    TOKENS,
    question_first_token="enc",
    max_question_tokens=35,
    beams=3,
    max_length=10,
    min_length=1,
    label_smoothing=0.1,
    attend_padding=True,
)
PLACEHOLDERS = ChatSpec(
    layout="placeholders",
    tokens_per_tile=4,
    image_token="<|image|>",
    image_token_id=320,
    global_image_token=None,
    tile_tokens={},
    prompt=PromptSpec("Question: ", " Answer:"),
    context_length=512,
    max_prompt_tokens=79,
    eos_token_ids=(2,),
    pad_token_id=2,
    max_new_tokens=20,
    sampling=SamplingSpec(top_k=50, top_p=0.9, temperature=0.5),
)
PREPENDED = replace(PLACEHOLDERS, layout="prepended", image_token=None, image_token_id=None)
TILES = replace(
    PLACEHOLDERS, layout="tiles", global_image_token="<|global_image|>", tile_tokens={"r1c1": "<row_1_col_1>"}
)
FEATURES = FeatureSpec("vision")
TASKS: tuple[TaskSpec, ...] = (EMBED, MATCH, CAPTION, ANSWER, PLACEHOLDERS, PREPENDED, TILES, FEATURES)


def read(task: TaskSpec, data: Any) -> TaskSpec:
    return type(task).from_json(data, "vlm_export.json: tasks[0]")


def data_of(task: TaskSpec, path: str, value: Any) -> dict[str, Any]:
    """The task's data with one value changed."""
    data: dict[str, Any] = copy.deepcopy(json.loads(json.dumps(task.to_json())))
    *outer, name = path.split(".")
    group: Any = data
    for key in outer:
        group = group[key]
    group[name] = value
    return data


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.kind))
def test_tasks_survive_json(task: TaskSpec) -> None:
    assert read(task, json.loads(json.dumps(task.to_json()))) == task


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.kind))
def test_missing_and_unknown_fields_are_refused(task: TaskSpec) -> None:
    data = task.to_json()
    with pytest.raises(InputError, match="unknown field 'voice'"):
        read(task, {**data, "voice": 1})
    for name in data:
        with pytest.raises(InputError, match="missing fields"):
            read(task, {key: value for key, value in data.items() if key != name})
    other: Any
    for other in ({}, [], None):
        with pytest.raises(InputError):
            read(task, other)


@pytest.mark.parametrize(
    ("task", "path", "value"),
    [
        (EMBED, "score.activation", "relu"),
        (EMBED, "score.logit_scale", "4.6"),
        (EMBED, "score.logit_scale", True),
        (EMBED, "score.logit_scale", 101),
        (EMBED, "score.logit_scale", float("nan")),
        (EMBED, "score.logit_bias", None),
        (EMBED, "image.part", None),
        (EMBED, "image.pooling", "max"),
        (EMBED, "text", None),  # and there is a score
        (MATCH, "first_token", None),
        (MATCH, "first_token", "dec"),
        (MATCH, "max_text_tokens", 35.0),
        (MATCH, "max_text_tokens", 1),
        (MATCH, "tokens.sep", -1),
        (MATCH, "tokens.cls", True),
        (MATCH, "tokens.decoder_start", 1 << 31),
        (CAPTION, "prompt", None),
        (CAPTION, "beams", 0),
        (CAPTION, "beams", 1001),
        (CAPTION, "max_length", 0),
        (CAPTION, "min_length", 21),
        (CAPTION, "min_length", -1),
        (ANSWER, "question_first_token", "dec"),
        (ANSWER, "label_smoothing", 1),
        (ANSWER, "label_smoothing", -0.1),
        (ANSWER, "label_smoothing", "0.1"),
        (ANSWER, "label_smoothing", True),
        (ANSWER, "attend_padding", 1),
        (ANSWER, "max_question_tokens", 1),
        (ANSWER, "min_length", 11),
        (TILES, "layout", "appended"),
        (TILES, "tokens_per_tile", 0),
        (TILES, "tokens_per_tile", 513),
        (TILES, "image_token", None),
        (TILES, "image_token", 5),
        (TILES, "image_token_id", None),
        (TILES, "image_token_id", "320"),
        (TILES, "global_image_token", 1),
        (TILES, "tile_tokens", []),
        (TILES, "tile_tokens", {"r1c1": 1}),
        (TILES, "context_length", 1),
        (TILES, "context_length", True),
        (TILES, "max_prompt_tokens", 0),
        (TILES, "eos_token_ids", 2),
        (TILES, "eos_token_ids", [True]),
        (TILES, "eos_token_ids", [-1]),
        (TILES, "pad_token_id", -1),
        (TILES, "max_new_tokens", 0),
        (TILES, "prompt.before", None),
        (TILES, "prompt.after", 1),
        (TILES, "sampling.top_k", 0),
        (TILES, "sampling.top_p", 0),
        (TILES, "sampling.top_p", 1.5),
        (TILES, "sampling.top_p", True),
        (TILES, "sampling.temperature", 0),
        (TILES, "sampling.temperature", None),
        (TILES, "sampling.temperature", "1"),
        (FEATURES, "part", None),
    ],
    ids=lambda value: str(value.kind) if hasattr(value, "kind") else None,
)
def test_a_wrong_field_is_named_with_its_path(task: TaskSpec, path: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read(task, data_of(task, path, value))
    *outer, name = path.split(".")
    # What is missing beside another field may be told by the other's name.
    named = {"text": "score", "image_token_id": "image_token"}.get(name, name) if value is None else name
    assert f"'{named}'" in caught.value.what
    assert caught.value.where == ".".join(("vlm_export.json: tasks[0]", *outer))
    assert caught.value.exit_status == 3


def test_no_narrowing_is_null() -> None:
    sampling = {"top_k": None, "top_p": None, "temperature": 1, "order": "temperature_last"}
    task = read(PLACEHOLDERS, data_of(PLACEHOLDERS, "sampling", sampling))
    assert isinstance(task, ChatSpec)
    assert task.sampling == SamplingSpec(None, None, 1.0, "temperature_last")


def test_a_layout_and_its_markers_agree() -> None:
    with pytest.raises(InputError, match="'image_token'"):
        replace(PREPENDED, image_token="<|image|>", image_token_id=320)
    for changes in ({"tile_tokens": {"r1c1": "<row_1_col_1>"}}, {"global_image_token": "<|global_image|>"}):
        with pytest.raises(InputError, match="tile_tokens"):
            replace(PLACEHOLDERS, **changes)


def test_an_embedding_needs_an_encoder_and_a_score_two() -> None:
    with pytest.raises(InputError, match="'image'"):
        EmbedSpec(None, None)
    with pytest.raises(InputError, match="'score'"):
        replace(EMBED, text=None)


def test_the_scale_is_stored_as_its_logarithm() -> None:
    assert ScoreSpec("softmax", math.log(100)).scale == pytest.approx(100)


def test_the_first_token_follows_the_convention() -> None:
    assert (TOKENS.first("cls"), TOKENS.first("enc")) == (101, 156)


def test_parts_and_token_ids_of_each_task() -> None:
    assert EMBED.parts == ("vision", "text")
    assert replace(EMBED, text=None, score=None).parts == ("vision",)
    assert MATCH.parts == ("vision", "text", "multimodal_text")
    assert CAPTION.parts == ("vision", "cross_key_values", "text_decoder")
    assert ANSWER.parts == ("vision", "vqa_encoder", "cross_key_values", "text_decoder")
    assert TILES.parts == ("vision_encoder", "embed_tokens", "decoder")
    assert FEATURES.parts == ("vision",)
    assert MATCH.token_ids == CAPTION.token_ids == ANSWER.token_ids == {0, 101, 102, 155, 156}
    assert PLACEHOLDERS.token_ids == {2, 320}
    assert PREPENDED.token_ids == {2}
    assert EMBED.token_ids == FEATURES.token_ids == frozenset()


def test_tasks_are_limited_to_parts() -> None:
    tasks = (EMBED, MATCH)
    assert limited_tasks(tasks, ["vision", "text", "multimodal_text"]) == tasks
    assert limited_tasks(tasks, ["vision", "text"]) == (EMBED,)
    assert limited_tasks(tasks, ["text"]) == (EmbedSpec(None, EMBED.text),)
    assert limited_tasks(tasks, ["multimodal_text"]) == ()
