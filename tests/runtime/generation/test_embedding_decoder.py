"""The state of a decoder that reads embeddings: padding changes nothing, rows move with all they have, no cache too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import Array, TensorInfo
from vlm_export.runtime.generation import embedding_decoder as embedded_decoder
from vlm_export.runtime.generation.embedding_decoder import EmbeddedDecoderState, EmbeddedRows, left_padded
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions

WIDTH, VOCABULARY = 8, 13
Ids = npt.NDArray[np.int64]


class ToyEmbedding:
    """The graph of `embed_tokens`: a seeded table."""

    def __init__(self) -> None:
        self.table = np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
        self.inputs: tuple[TensorInfo, ...] = (TensorInfo("input_ids", "int64", ("batch", "sequence")),)
        self.outputs: tuple[TensorInfo, ...] = (TensorInfo("inputs_embeds", "float32", ("batch", "sequence", WIDTH)),)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"inputs_embeds": self.table[feeds["input_ids"]]}


class ToyAttention:
    """The graph of `decoder`: one head of causal attention whose keys are turned by their positions, in float64."""

    def __init__(self, dtype: str = "float32") -> None:
        rng = np.random.default_rng(2)
        self.weights = {name: rng.standard_normal((WIDTH, WIDTH)) for name in ("query", "key", "value")}
        self.head = rng.standard_normal((WIDTH, VOCABULARY)) * 2
        caches = [
            TensorInfo(f"past_key_values.0.{kind}", dtype, ("batch", 1, "past_sequence", WIDTH))
            for kind in ("key", "value")
        ]
        ids = [TensorInfo(name, "int64", ("batch", None)) for name in ("attention_mask", "position_ids")]
        kept = TensorInfo("num_logits_to_keep", "int64", ())
        self.inputs: tuple[TensorInfo, ...] = (
            TensorInfo("inputs_embeds", dtype, ("batch", "sequence", WIDTH)),
            *ids,
            kept,
            *caches,
        )
        names = ("logits", "present.0.key", "present.0.value")
        self.outputs: tuple[TensorInfo, ...] = tuple(TensorInfo(name, dtype, (None,)) for name in names)
        self.dtype = dtype
        self.fed: list[dict[str, Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.fed.append(dict(feeds))
        for port in self.inputs:
            assert str(feeds[port.name].dtype) == port.dtype, port.name
        embeds, mask = feeds["inputs_embeds"].astype(np.float64), feeds["attention_mask"]
        angle = feeds["position_ids"][..., None] * np.linspace(0.1, 1.0, WIDTH)
        query, key, value = (embeds @ self.weights[name] for name in ("query", "key", "value"))
        query, key = query * np.cos(angle), key * np.cos(angle)
        past = [feeds[f"past_key_values.0.{kind}"][:, 0].astype(np.float64) for kind in ("key", "value")]
        key, value = np.concatenate([past[0], key], axis=1), np.concatenate([past[1], value], axis=1)
        tokens, total = query.shape[1], key.shape[1]
        assert mask.shape == (len(query), total)
        causal = np.tril(np.ones((tokens, total)), total - tokens)
        scores = query @ key.transpose(0, 2, 1) + np.where(causal * mask[:, None] > 0, 0.0, -1e9)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = weights / weights.sum(axis=-1, keepdims=True) @ value
        logits = context[:, -int(feeds["num_logits_to_keep"]) :] @ self.head
        present = {"present.0.key": key[:, None], "present.0.value": value[:, None], "logits": logits}
        return {name: array.astype(self.dtype) for name, array in present.items()}


def prompts_of(*lengths: int) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal((length, WIDTH)).astype(np.float32) for length in lengths]


def ids_of(rows: Any, *, cached: bool = True, decoder: ToyAttention | None = None, tokens: int = 9) -> list[list[int]]:
    options = GenerationOptions(eos_token_ids=(8,), max_new_tokens=tokens)
    batch = left_padded(rows)
    state = EmbeddedDecoderState(decoder or ToyAttention(), ToyEmbedding(), batch, cached=cached)
    found = generate(state, np.zeros_like(batch.attention_mask), options)
    return [row[batch.attention_mask.shape[1] :] for row in found]


def test_left_padding() -> None:
    rows = prompts_of(2, 4)
    batch = left_padded(rows)
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert np.array_equal(batch.inputs_embeds[0, 2:], rows[0])
    assert not batch.inputs_embeds[0, :2].any()
    assert np.array_equal(batch.inputs_embeds[1], rows[1])


def test_rows_decode_as_if_they_were_alone() -> None:
    rows = prompts_of(3, 7, 1, 5, 2, 6)
    alone = [ids_of([row])[0] for row in rows]
    assert len({tuple(row) for row in alone}) > 3
    assert len({len(row) for row in alone}) > 1, "no row leaves the batch early"
    assert ids_of(rows) == alone


def test_the_cache_changes_nothing() -> None:
    rows = prompts_of(3, 7, 1, 5, 2, 6)
    decoder = ToyAttention()
    assert ids_of(rows, cached=False, decoder=decoder) == ids_of(rows)
    for number, feeds in enumerate(decoder.fed):
        assert feeds["past_key_values.0.key"].shape[2] == 0
        assert feeds["inputs_embeds"].shape[1] == 7 + number
        assert np.array_equal(feeds["position_ids"], np.maximum(feeds["attention_mask"].cumsum(axis=1) - 1, 0))


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 6])
def test_prompts_in_pieces_are_prompts(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts_of(3, 7, 1, 5, 2, 6)
    whole, whole_ids = ToyAttention(), ids_of(rows)
    logits = EmbeddedDecoderState(whole, ToyEmbedding(), left_padded(rows)).forward(np.zeros((6, 7), np.int64))
    assert len(whole.fed) == 1
    monkeypatch.setattr(embedded_decoder, "_PIECE_TOKENS", piece)
    cut = ToyAttention()
    pieces = EmbeddedDecoderState(cut, ToyEmbedding(), left_padded(rows)).forward(np.zeros((6, 7), np.int64))
    lengths = [feeds["inputs_embeds"].shape[1] for feeds in cut.fed]
    assert sum(lengths) == 7
    assert max(lengths) <= piece
    # A short piece would read all weights for few tokens.
    assert max(lengths) - min(lengths) <= 1
    real = left_padded(rows).attention_mask > 0
    assert np.allclose(pieces[real], logits[real], atol=1e-5)
    assert ids_of(rows) == whole_ids
    assert ids_of(rows, cached=False) == whole_ids


def test_what_is_fed() -> None:
    decoder, embedding = ToyAttention(), ToyEmbedding()
    state = EmbeddedDecoderState(decoder, embedding, left_padded(prompts_of(2, 3)))
    assert state.rows == 2
    assert state.forward(np.zeros((2, 1), np.int64)).shape == (2, 3, VOCABULARY)
    assert state.step(np.array([[5], [6]])).shape == (2, VOCABULARY)
    state.step(np.array([[7, 8], [9, 1]]))
    first, second, third = decoder.fed
    # A step needs the last token's logits only: all of a long prompt's would take gigabytes.
    assert [int(feeds["num_logits_to_keep"]) for feeds in decoder.fed] == [0, 1, 1]
    assert first["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert first["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert second["position_ids"].tolist() == [[2], [3]]
    assert second["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert np.array_equal(second["inputs_embeds"], embedding.table[[[5], [6]]])
    assert third["position_ids"].tolist() == [[3, 4], [4, 5]]
    assert third["past_key_values.0.value"].shape == (2, 1, 4, WIDTH)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("before", [0, 1])
def test_selected_rows_take_everything_along(before: int, cached: bool) -> None:
    rows = prompts_of(2, 5, 3)
    state = EmbeddedDecoderState(ToyAttention(), ToyEmbedding(), left_padded(rows), cached=cached)
    chosen: Ids = np.array([2, 0, 0, 1])
    words: Ids = np.array([[5], [6], [7]])
    if not before:
        state.select(chosen)
        logits = state.step(np.zeros((4, 5), np.int64))
    else:
        state.step(np.zeros((3, 5), np.int64))
        state.select(chosen)
        logits = state.step(words[chosen])
    for got, number in zip(logits, chosen, strict=True):
        single = EmbeddedDecoderState(ToyAttention(), ToyEmbedding(), left_padded([rows[number]]))
        expected = single.step(np.zeros((1, 1), np.int64))
        if before:
            expected = single.step(words[number][None])
        assert np.allclose(got, expected[0], atol=1e-5)


def test_neighbours_are_not_copied() -> None:
    decoder = ToyAttention()
    state = EmbeddedDecoderState(decoder, ToyEmbedding(), left_padded(prompts_of(2, 5, 3)))
    state.step(np.zeros((3, 5), np.int64))
    state.select(np.array([0, 1, 2]))
    state.select(np.array([1, 2]))
    state.step(np.array([[5], [6]]))
    past = decoder.fed[-1]["past_key_values.0.key"]
    assert past.base is not None
    assert len(past) == 2


def test_half_precision_goes_in_and_float32_comes_out() -> None:
    state = EmbeddedDecoderState(ToyAttention("float16"), ToyEmbedding(), left_padded(prompts_of(2)))
    logits = [state.step(np.array([[token]])) for token in (0, 5, 6)]
    assert {array.dtype for array in logits} == {np.dtype(np.float32)}


def test_other_graphs_and_prompts_are_refused() -> None:
    without = ToyAttention()
    without.outputs = without.outputs[:2]
    rows = left_padded(prompts_of(2, 3))
    with pytest.raises(InputError, match="no cache"):
        EmbeddedDecoderState(without, ToyEmbedding(), rows)
    loose = ToyAttention()
    loose.inputs = (
        *loose.inputs[:-1],
        TensorInfo("past_key_values.0.value", "float32", ("batch", None, "past", WIDTH)),
    )
    with pytest.raises(InputError, match="no fixed heads"):
        EmbeddedDecoderState(loose, ToyEmbedding(), rows)
    right = EmbeddedRows(rows.inputs_embeds, rows.attention_mask[:, ::-1])
    for bad in (right, EmbeddedRows(rows.inputs_embeds[:0], rows.attention_mask[:0])):
        with pytest.raises(UsageError, match="last place"):
            EmbeddedDecoderState(ToyAttention(), ToyEmbedding(), bad)
