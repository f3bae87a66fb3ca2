"""The decoder's state: which arrays move when rows do, and the oracle's token ids with the cache and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import Array, Engine, OrtEngine, TensorInfo
from vlm_export.runtime.engines.openvino import OpenVinoEngine
from vlm_export.runtime.generation.cross_attention_decoder import CrossAttentionState
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions, padded_ids

Ids = npt.NDArray[np.int64]
KV = ("key", "value")
KEY = "past_key_values.0.encoder.key"
LAYERS, HEADS, WIDTH, VOCABULARY = 2, 3, 4, 11
OPEN_ENGINE: dict[str, Callable[[Path], Engine]] = {
    "onnxruntime": lambda path: OrtEngine(path, threads=1),
    "openvino": lambda path: OpenVinoEngine(path, threads=1),
}


class RecordingDecoder:
    """A graph that appends each row's token ids to its cache and remembers what it was fed."""

    def __init__(self, dtype: str = "float32", kinds: Sequence[str] = ("decoder", "encoder")) -> None:
        names = [f"past_key_values.{i}.{kind}.{what}" for i in range(LAYERS) for kind in kinds for what in KV]
        ids = [TensorInfo(name, "int64", ("batch", None)) for name in ("input_ids", "attention_mask")]
        mask = TensorInfo("encoder_attention_mask", "int64", ("batch", "encoder_sequence"))
        caches = [TensorInfo(name, dtype, ("batch", HEADS, "tokens", WIDTH)) for name in names]
        self.inputs: tuple[TensorInfo, ...] = (*ids, mask, *caches)
        self.outputs: tuple[TensorInfo, ...] = ()
        self.dtype = dtype
        self.fed: list[dict[str, Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.fed.append(dict(feeds))
        ids = feeds["input_ids"]
        new = np.broadcast_to(ids[:, None, :, None], (len(ids), HEADS, ids.shape[1], WIDTH)).astype(self.dtype)
        present = {
            name.replace("past_key_values.", "present."): np.concatenate([array, new], axis=2)
            for name, array in feeds.items()
            if ".decoder." in name
        }
        return {"logits": np.zeros((*ids.shape, VOCABULARY), np.float32), **present}


def keys_values(sources: int, dtype: str = "float32") -> dict[str, Array]:
    rng = np.random.default_rng(0)
    names = [f"present.{i}.encoder.{what}" for i in range(LAYERS) for what in KV]
    return {name: rng.standard_normal((sources, HEADS, 5, WIDTH)).astype(dtype) for name in names}


def state_of(decoder: RecordingDecoder, sources: int = 2) -> CrossAttentionState:
    masks = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], np.int64)
    return CrossAttentionState(decoder, keys_values(sources), masks[:sources])


def rows(*numbers: int) -> Ids:
    return np.array(numbers, np.int64)


def test_the_cache_grows_and_follows_its_rows() -> None:
    decoder = RecordingDecoder()
    state = state_of(decoder)
    state.step(np.array([[1, 2], [3, 4]]))
    state.select(rows(1, 0, 1))
    logits = state.step(np.array([[5], [6], [7]]))
    assert logits.shape == (3, VOCABULARY)
    state.step(np.array([[8], [8], [8]]))
    for feeds, length in zip(decoder.fed, (0, 2, 3), strict=True):
        assert feeds["past_key_values.1.decoder.value"].shape[2] == length
        assert feeds["attention_mask"].shape[1] == length + feeds["input_ids"].shape[1]
        assert feeds["attention_mask"].all()
    cached = decoder.fed[2]["past_key_values.1.decoder.key"][:, 0, :, 0]
    assert cached.tolist() == [[3, 4, 5], [1, 2, 6], [3, 4, 7]]
    assert decoder.fed[2]["encoder_attention_mask"].sum(axis=1).tolist() == [3, 5, 3]
    assert np.array_equal(decoder.fed[2][KEY], keys_values(2)["present.0.encoder.key"][[1, 0, 1]])


def test_keys_and_values_of_sources_move_only_when_a_row_changes_its_source() -> None:
    decoder = RecordingDecoder()
    state = state_of(decoder)
    state.step(rows(1, 2)[:, None])
    state.select(rows(0, 0, 1, 1))
    state.step(rows(3, 4, 5, 6)[:, None])
    state.select(rows(1, 0, 3, 3))
    state.step(rows(7, 8, 9, 9)[:, None])
    # Beams changed places within their images: the same arrays, not copies of them.
    assert decoder.fed[2][KEY] is decoder.fed[1][KEY]
    assert decoder.fed[2]["past_key_values.0.decoder.key"][:, 0, :, 0].tolist() == [[1, 4], [1, 3], [2, 6], [2, 6]]
    state.select(rows(2, 3))
    state.step(rows(1, 1)[:, None])
    assert np.shares_memory(decoder.fed[3][KEY], decoder.fed[2][KEY])
    assert np.array_equal(decoder.fed[3][KEY], decoder.fed[2][KEY][2:])
    state.select(rows(1, 0))
    state.step(rows(1, 1)[:, None])
    assert decoder.fed[4][KEY] is decoder.fed[3][KEY]


def test_selected_leaves_the_state_as_it_was() -> None:
    decoder = RecordingDecoder()
    state = state_of(decoder, 3)
    state.step(rows(1, 2, 3)[:, None])
    twin = state.selected(rows(2, 2))
    twin.forward(np.array([[4, 5], [6, 0]]))
    state.step(rows(7, 8, 9)[:, None])
    assert (twin.rows, state.rows) == (2, 3)
    assert decoder.fed[1]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert decoder.fed[2]["attention_mask"].tolist() == [[1, 1], [1, 1], [1, 1]]
    assert decoder.fed[1]["encoder_attention_mask"].tolist() == [[1, 0, 0, 0, 0]] * 2
    assert decoder.fed[2]["past_key_values.0.decoder.key"][:, 0, :, 0].tolist() == [[1], [2], [3]]
    assert np.array_equal(decoder.fed[2][KEY], decoder.fed[0][KEY])


def test_caches_have_the_precision_of_the_graph() -> None:
    decoder = RecordingDecoder("float16")
    state = state_of(decoder)
    assert state.step(rows(1, 2)[:, None]).dtype == np.float32
    assert {array.dtype.name for name, array in decoder.fed[0].items() if "past" in name} == {"float16"}


@pytest.mark.parametrize("kinds", [("decoder",), ("encoder",), ("decoder", "encoder", "encoder.extra")])
def test_another_graph_is_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="other keys and values"):
        state_of(RecordingDecoder(kinds=kinds))


class Uncached:
    """Feeds every row from its start at each step, to a state that knows nothing yet."""

    def __init__(self, start: Callable[[], CrossAttentionState], count: int) -> None:
        self._start, self._fed, self._rows = start, np.zeros((count, 0), np.int64), np.arange(count)

    def step(self, token_ids: Ids) -> npt.NDArray[np.float32]:
        self._fed = np.concatenate([self._fed, token_ids], axis=1)
        return self._start().selected(self._rows).step(self._fed)

    def select(self, rows: Ids) -> None:
        self._fed, self._rows = self._fed[rows], self._rows[rows]


@dataclass(frozen=True)
class Oracle:
    """A recorded generation: how a state starts for images `first` to `last`, from what prompt, and what came."""

    start: Callable[[int, int], CrossAttentionState]
    prompt: Ids
    bounds: tuple[int, int]
    record: Mapping[str, Any]

    def generated(self, beams: int, first: int, last: int, *, cached: bool) -> Ids:
        options = GenerationOptions(
            eos_token_ids=(102,), max_length=self.bounds[0], min_length=self.bounds[1], beams=beams
        )
        state = self.start(first, last) if cached else Uncached(lambda: self.start(first, last), last - first)
        rows = generate(state, self.prompt[first:last], options)
        longest = self.bounds[0]
        return padded_ids([row + [0] * (longest - len(row)) for row in rows], options)


@pytest.fixture(scope="module", params=sorted(OPEN_ENGINE))
def engine_of(request: pytest.FixtureRequest, blip_bundle: Callable[[str], Path]) -> Callable[[str, str], Engine]:
    opened: dict[tuple[str, str], Engine] = {}

    def engine(variant: str, part: str) -> Engine:
        if (variant, part) not in opened:
            path = blip_bundle(variant) / "onnx" / f"{'vision_model' if part == 'vision' else part}.onnx"
            opened[variant, part] = OPEN_ENGINE[request.param](path)
        return opened[variant, part]

    return engine


@pytest.fixture(scope="module")
def captions(engine_of: Callable[[str, str], Engine], blip_record: Callable[[str], dict[str, Any]]) -> Oracle:
    record = blip_record("caption")
    seen = engine_of("caption", "vision").run({"pixel_values": record["input.image"]})["last_hidden_state"]
    mask = np.ones(seen.shape[:2], np.int64)

    def start(first: int, last: int) -> CrossAttentionState:
        keys = engine_of("caption", "cross_key_values").run({"encoder_hidden_states": seen[first:last]})
        return CrossAttentionState(engine_of("caption", "text_decoder"), keys, mask[first:last])

    return Oracle(start, record["input.prompt_ids"], (20, 5), record)


@pytest.fixture(scope="module")
def answers(engine_of: Callable[[str, str], Engine], blip_record: Callable[[str], dict[str, Any]]) -> Oracle:
    record = blip_record("vqa")
    seen = engine_of("vqa", "vision").run({"pixel_values": record["input.image"]})["last_hidden_state"]
    ids = record["input.input_ids"].copy()
    ids[:, 0] = 156
    feeds = {"input_ids": ids, "attention_mask": record["input.attention_mask"], "encoder_hidden_states": seen}
    states = engine_of("vqa", "vqa_encoder").run(feeds)["last_hidden_state"]

    def start(first: int, last: int) -> CrossAttentionState:
        keys = engine_of("vqa", "cross_key_values").run({"encoder_hidden_states": states[first:last]})
        return CrossAttentionState(engine_of("vqa", "text_decoder"), keys, np.ones_like(ids[first:last]))

    return Oracle(start, np.full((3, 1), 155), (10, 1), record)


@pytest.mark.needs_torch
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_the_originals_token_by_token(captions: Oracle, beams: int, cached: bool) -> None:
    expected = captions.record[f"output.generated_ids_beam{beams}"]
    assert np.array_equal(captions.generated(beams, 0, 3, cached=cached), expected)
    for row in range(3):
        assert np.array_equal(captions.generated(beams, row, row + 1, cached=cached), expected[row : row + 1])


@pytest.mark.needs_torch
@pytest.mark.parametrize("cached", [True, False])
def test_answers_are_the_originals_token_by_token(answers: Oracle, cached: bool) -> None:
    # One at a time, each keeps the width of the padded batch: the decoder attends to the padding.
    expected = answers.record["output.generated_ids_beam3"]
    assert np.array_equal(answers.generated(3, 0, 3, cached=cached), expected)
    for row in range(3):
        assert np.array_equal(answers.generated(3, row, row + 1, cached=cached), expected[row : row + 1])


@pytest.mark.needs_torch
def test_tokens_may_be_fed_together_or_one_by_one(captions: Oracle, assert_same: Callable[..., None]) -> None:
    ids, mask = captions.record["input.input_ids"].copy(), captions.record["input.attention_mask"]
    ids[:, 0] = 155
    expected = captions.record["output.logits_teacher_forced"][mask == 1]
    # Padding after a row's tokens changes none of them.
    assert_same(captions.start(0, 3).forward(ids)[mask == 1], expected)
    state = captions.start(0, 3)
    steps = [state.forward(ids[:, i : i + 1]) for i in range(ids.shape[1])]
    assert_same(np.concatenate(steps, axis=1)[mask == 1], expected)
