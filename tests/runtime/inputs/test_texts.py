"""Token ids equal the original's; long, odd and broken texts are defined."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs import texts as text_module
from vlm_export.runtime.inputs.texts import Tokenizer, clean_text
from vlm_export.specs import TextSpec

RECORD = json.loads((Path(__file__).parents[2] / "data" / "clip" / "tokenizer.json").read_text(encoding="utf-8"))
CASES = RECORD["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_equal_the_original_record(clip_tokenizer: Tokenizer, case: dict[str, object]) -> None:
    text = str(case["text"])
    assert clip_tokenizer.encode([text], truncate=True, pad_to=77).tolist() == [case["ids77_truncate"]]
    if case["error"] is None:
        assert clip_tokenizer.encode([text], pad_to=77).tolist() == [case["ids77"]]
    else:
        with pytest.raises(InputError, match="too long for the model"):
            clip_tokenizer.encode([text])


def test_the_record_needs_the_repair_of_texts(clip_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original ran with ftfy: without it, curly quotes and mojibake get other ids."""
    monkeypatch.setattr(text_module, "clean_text", lambda text: " ".join(text.split()).lower())
    different = [
        c["text"]
        for c in CASES
        if clip_tokenizer.encode([c["text"]], truncate=True, pad_to=77).tolist() != [c["ids77_truncate"]]
    ]
    assert any("“curly”" in text for text in different)
    assert any("mojibake" in text for text in different)


def test_batch_is_as_wide_as_its_longest_row(clip_tokenizer: Tokenizer) -> None:
    ids = clip_tokenizer.encode(["a photo of a cat", "", "cat"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407],
        [49406, 49407, 0, 0, 0, 0, 0],
        [49406, 2368, 49407, 0, 0, 0, 0],
    ]
    assert clip_tokenizer.encode(["cat"], pad_to=5).shape == (1, 5)
    assert clip_tokenizer.encode(["a photo of a cat"], pad_to=5).shape == (1, 7)
    assert clip_tokenizer.encode([]).shape[0] == 0


def test_mask_follows_the_rows_not_the_padding_token(clip_tokenizer: Tokenizer) -> None:
    texts = ["a !! cat", "cat"]  # "!" has the id 0, which is also the padding
    ids, mask = clip_tokenizer.encode_masked(texts, pad_to=8)
    assert mask.dtype == ids.dtype == np.int64
    assert ids.tolist() == clip_tokenizer.encode(texts, pad_to=8).tolist()
    rows = clip_tokenizer.encode_rows(texts)
    assert mask.tolist() == [[1] * len(row) + [0] * (8 - len(row)) for row in rows]
    again, mask = clip_tokenizer.pad_masked([[5, 0, 0], [7]])
    assert (again.tolist(), mask.tolist()) == ([[5, 0, 0], [7, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    assert [array.shape for array in clip_tokenizer.encode_masked([])] == [(0, 1)] * 2
    with pytest.raises(UsageError, match="pad_to"):
        clip_tokenizer.encode_masked(texts, pad_to=78)


@pytest.mark.needs_torch
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ("the cat ' s dog , is n ' t it ?", "the cat's dog, isn't it?"),
        ("play ##ing 3 . 5 [SEP] [PAD] [PAD]", "playing 3. 5"),
        ("[CLS] cat ! !", "cat!!"),
        ("", ""),
    ],
)
def test_word_pieces_are_read_as_bert_s_tokenizer_reads_them(
    pieces: str, text: str, tmp_path: Path, wordpiece_json: Callable[[str], str]
) -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*specials, *(word for word in dict.fromkeys(pieces.split()) if word not in specials)]
    path = tmp_path / "tokenizer.json"
    path.write_text(wordpiece_json("\n".join(words)), encoding="utf-8")
    tokenizer = Tokenizer(path, TextSpec(35, len(words), 3, 0, "none"))
    assert tokenizer.decode(np.array([words.index(piece) for piece in pieces.split()], np.int64)) == text


def test_padding_uses_the_spec(clip_tokenizer_json: Path, clip_text_spec: TextSpec) -> None:
    tokenizer = Tokenizer(clip_tokenizer_json, replace(clip_text_spec, pad_token_id=49407))
    assert tokenizer.encode(["cat"], pad_to=4).tolist() == [[49406, 2368, 49407, 49407]]


def test_too_long_text_is_named_with_its_length(clip_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as caught:
        clip_tokenizer.encode(["short", "word " * 100])
    message = str(caught.value)
    assert caught.value.exit_status == 3
    assert "text 1: 'word word" in message
    assert "102 tokens" in message
    assert "at most 77 tokens" in message


def test_exactly_full_context_needs_no_truncation(clip_tokenizer: Tokenizer) -> None:
    assert clip_tokenizer.encode(["cat " * 75]).shape == (1, 77)
    with pytest.raises(InputError):
        clip_tokenizer.encode(["cat " * 76])
    truncated = clip_tokenizer.encode(["cat " * 76], truncate=True)
    assert truncated.shape == (1, 77)
    assert truncated[0, -1] == 49407


def test_endless_word_is_capped_and_fast(clip_tokenizer: Tokenizer) -> None:
    word = "a" * 64_000
    with pytest.raises(InputError, match="too many characters") as caught:
        clip_tokenizer.encode([word])
    assert "64,000" in str(caught.value)
    # Of the processor: what else runs on the machine is not the tokenizer's time.
    start = time.process_time()
    ids = clip_tokenizer.encode([word], truncate=True)
    assert time.process_time() - start < 2.0
    assert ids.shape == (1, 77)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("nul\x00byte", "nulbyte"),
        ("\ud800half", "\ufffdhalf"),
        ("  A\u00a0 B\r\n", "a b"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("ΟΔΟΣ", "οδος"),
        ("", ""),
    ],
)
def test_cleaning_is_the_original_s(text: str, clean: str, clip_tokenizer: Tokenizer) -> None:
    assert clean_text(text) == clean
    assert clip_tokenizer.encode([text]).tolist() == clip_tokenizer.encode([clean]).tolist()


def test_symbols_swallow_the_start_of_a_special_token(clip_tokenizer: Tokenizer) -> None:
    assert 49407 in clip_tokenizer.encode(["x<|endoftext|>y"])[0, :-1]
    assert 49407 not in clip_tokenizer.encode(["!<|endoftext|>y"])[0, :-1]


def test_without_cleaning_the_tokenizer_file_decides(clip_tokenizer_json: Path, clip_text_spec: TextSpec) -> None:
    tokenizer = Tokenizer(clip_tokenizer_json, replace(clip_text_spec, cleaning="none"))
    assert tokenizer.encode(["A  Photo"]).tolist() == [[49406, 320, 1125, 49407]]
    assert 49407 in tokenizer.encode(["!<|endoftext|>y"])[0, :-1]
    assert tokenizer.encode(["nul\x00byte"]).shape[1] > 3
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode(["fine", "\ud800half"])


def test_single_string_and_other_types_are_refused(clip_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="single string"):
        clip_tokenizer.encode("a cat")
    with pytest.raises(InputError, match="not a string"):
        clip_tokenizer.encode([b"a cat"])  # type: ignore[list-item]  # the mistake under test
    with pytest.raises(UsageError, match="pad_to"):
        clip_tokenizer.encode(["a cat"], pad_to=78)


@pytest.mark.parametrize("content", ["", "{}", "<!doctype html>", '{"model": 1}'])
def test_broken_tokenizer_file_is_named(content: str, tmp_path: Path, clip_text_spec: TextSpec) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer(path, clip_text_spec)
    with pytest.raises(InputError, match=r"absent\.json"):
        Tokenizer(tmp_path / "absent.json", clip_text_spec)


def test_tokenizer_of_another_model_is_refused(clip_tokenizer_json: Path, clip_text_spec: TextSpec) -> None:
    with pytest.raises(InputError, match="do not fit"):
        Tokenizer(clip_tokenizer_json, replace(clip_text_spec, vocab_size=200, end_token_id=199))
    with pytest.raises(InputError, match="does not end texts"):
        Tokenizer(clip_tokenizer_json, replace(clip_text_spec, end_token_id=2))
