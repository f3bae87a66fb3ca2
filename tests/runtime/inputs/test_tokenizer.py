"""Tokenizers that are no checkpoint's: refused when they are loaded, or named when they fail on a text."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.runtime.inputs.tokenizer import MAX_GROWTH, named_failures, tokenizer_from_json
from vlm_export.specs import TextSpec

ROOT = Path(__file__).parents[3]
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def spec(data: Path) -> TextSpec:
    rust = RustTokenizer.from_str(_plain(data))
    return TextSpec(20, rust.get_vocab_size(), rust.encode("").ids[-1], 0, "none")


def _plain(data: Path) -> str:
    return (data / "runtime" / "tiny_bundle" / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture
def opened(data: Path, spec: TextSpec, tmp_path: Path) -> Callable[..., Tokenizer]:
    """The tokenizer with fields of its tokenizer.json replaced."""

    def build(**fields: Any) -> Tokenizer:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(_plain(data)) | fields), encoding="utf-8")
        return Tokenizer(path, spec)

    return build


def replacements(*contents: str, pattern: str = ".") -> dict[str, Any]:
    stages = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": content} for content in contents]
    return {"type": "Sequence", "normalizers": stages}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(*entries: str) -> dict[str, Any]:
    trie = bytes(4096)
    raw = len(trie).to_bytes(4, "little") + trie + b"".join(entry.encode() + b"\0" for entry in entries)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def test_a_panic_while_loading_is_an_input_error(opened: Callable[..., Tokenizer]) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        opened(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="})


def test_a_panic_while_encoding_is_an_input_error(opened: Callable[..., Tokenizer]) -> None:
    tokenizer = opened(pre_tokenizer=split("(a+)+$"))
    with pytest.raises(InputError, match="cannot encode a text") as caught:
        tokenizer.encode(["a" * 40 + "b"], truncate=True)
    assert "retry-limit" in caught.value.got
    assert "tokenizer.json" in caught.value.where


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "unk_token": "NOPE", "vocab": {"<|endoftext|>": 0, "b": 1}},
        {"type": "Unigram", "unk_id": None, "vocab": [["q", -1.0]], "byte_fallback": False},
    ],
)
def test_models_without_an_unknown_token_fail_by_name(opened: Callable[..., Tokenizer], model: dict[str, Any]) -> None:
    tokenizer = opened(model=model)
    with pytest.raises(InputError, match="cannot encode a text"):
        tokenizer.encode(["zebra"])


@pytest.mark.parametrize(
    "normalizer",
    [
        replacements(*["a" * 10] * 6),
        replacements(*["aa"] * 6),
        replacements("a" * MAX_GROWTH, pattern=""),
        replacements(*[""] * 100),
        {"type": "Prepend", "prepend": "a" * MAX_GROWTH},
        {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 3},
        {"type": "Sequence", "normalizers": [replacements("aaa"), replacements("aaa"), replacements("aaa")]},
        charsmap("a", "b" * (MAX_GROWTH + 1)),
    ],
)
def test_normalizers_that_swell_texts_are_refused(opened: Callable[..., Tokenizer], normalizer: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="normalizer makes texts too long"):
        opened(normalizer=normalizer)


@pytest.mark.parametrize("pattern", ["a*", "a?", "a{0,2}", "a|", "(?=a)", "[ab]*", r"\z", "(a)*", "(?<=b)a*", "a|b*"])
def test_a_pattern_that_may_match_nothing_swells_texts(opened: Callable[..., Tokenizer], pattern: str) -> None:
    with pytest.raises(InputError, match="normalizer makes texts too long"):
        opened(normalizer=replacements(*["a"] * 12, pattern=pattern))


@pytest.mark.parametrize("pattern", ["a", "[a-c]+", "a{2,}", "(?<=b)a(?=c)", r"a\z", r"[\t-\r ]+", r"b*\Ka(?!b)"])
def test_a_pattern_that_matches_a_character_swells_none(opened: Callable[..., Tokenizer], pattern: str) -> None:
    assert opened(normalizer=replacements(*["a"] * 12, pattern=pattern))


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "vocab": {"a": 0}}
        | {"max_input_chars_per_word": 10**9},
        {"type": "Unigram", "unk_id": 0, "vocab": [["<|endoftext|>", 0.0], ["a" * 300, -1.0]], "byte_fallback": False},
    ],
)
def test_models_that_look_for_endless_tokens_are_refused(
    opened: Callable[..., Tokenizer], model: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="tokens that are too long"):
        opened(model=model)


def test_a_tokenizer_without_tokens_is_refused(opened: Callable[..., Tokenizer]) -> None:
    with pytest.raises(InputError, match="do not fit"):
        opened(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[])


def test_decoders_that_swell_texts_are_refused(opened: Callable[..., Tokenizer]) -> None:
    stages = replacements(*["a" * 10] * 6)["normalizers"]
    with pytest.raises(InputError, match="decoder makes texts too long"):
        opened(decoder={"type": "Sequence", "decoders": stages})


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFKC"},
        replacements("▁", pattern=" "),
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replacements("▁", pattern=" ")]},
        {"type": "Sequence", "normalizers": [charsmap("a", "b" * 18), replacements(" ", pattern=" {2,}")]},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    ],
)
def test_what_published_tokenizers_do_is_taken(opened: Callable[..., Tokenizer], normalizer: Any) -> None:
    assert opened(normalizer=normalizer).encode(["a cat"]).shape[0] == 1


def test_ids_around_a_text_are_the_model_s(opened: Callable[..., Tokenizer], spec: TextSpec) -> None:
    def around(ids: list[int]) -> dict[str, Any]:
        special = {"id": "E", "ids": ids, "tokens": ["x"] * len(ids)}
        pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "E", "type_id": 0}}]
        return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {"E": special}}

    assert opened(post_processor=around([3, spec.end_token_id])).encode([""]).tolist() == [[3, spec.end_token_id]]
    with pytest.raises(InputError, match="ids do not fit") as caught:
        opened(post_processor=around([999_999, spec.end_token_id]))
    assert "999999" in caught.value.got
    with pytest.raises(InputError, match="does not end texts") as caught:
        opened(post_processor=around([spec.end_token_id] * 100_000))
    assert len(caught.value.got) < 200


def test_published_tokenizers_load(clip_tokenizer_json: Path, clip_text_spec: TextSpec) -> None:
    tokenizer_from_json(clip_tokenizer_json.read_text(encoding="utf-8"), clip_text_spec, "CLIP")
    for path in (ROOT / "configs" / "demo").rglob("*tokenizer.json"):
        rust = RustTokenizer.from_file(str(path))
        end = (rust.encode("").ids or [0])[-1]
        chat = TextSpec(64, rust.get_vocab_size(), end, 0, "none", adds_eos=bool(rust.encode("").ids))
        tokenizer_from_json(path.read_text(encoding="utf-8"), chat, str(path))


def test_what_ends_a_process_is_no_input_error() -> None:
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind), named_failures("what", "where"):
            raise kind
