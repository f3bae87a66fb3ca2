"""A chat model's tokenizer: its own, with the added tokens at the end of the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer

from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.tokenizers.files import resolve_tokenizer
from vlm_export.family import Checkpoint
from vlm_export.specs import TextSpec

DATA = Path(__file__).parents[1] / "data" / "nanovlm" / "450m" / "tokenizer"
ADDED = ("<|image|>", "<|global_image|>")


def spec(*added: str, vocab_size: int = 320, end: int = 2) -> TextSpec:
    size = vocab_size + len(added)
    return TextSpec(512, size, end_token_id=end, pad_token_id=end, cleaning="none", adds_eos=False, added_tokens=added)


def resolve(text: TextSpec, path: Path = DATA) -> dict[str, bytes]:
    checkpoint = Checkpoint("a checkpoint", "hf_directory", (), {}, lambda key: pytest.fail(key))
    return dict(resolve_tokenizer(checkpoint, str(path), text).files)


def test_added_tokens_get_the_last_ids() -> None:
    files = resolve(spec(*ADDED))
    rust = RustTokenizer.from_str(files["tokenizer.json"].decode())
    before = RustTokenizer.from_file(str(DATA / "tokenizer.json"))
    assert [rust.token_to_id(token) for token in ADDED] == [320, 321]
    assert rust.encode("<|image|>What is this?").ids == [320, *before.encode("What is this?").ids]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["eos_token"], config["pad_token"], config["bos_token"]) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert config["additional_special_tokens"] == list(ADDED)
    assert config["model_max_length"] == 512
    assert json.loads(files["special_tokens_map.json"])["pad_token"] == "<|im_end|>"


def test_a_tokenizer_that_has_them_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(resolve(spec(*ADDED))["tokenizer.json"])
    assert resolve(spec(*ADDED), tmp_path)["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert resolve(spec())["tokenizer.json"] == (DATA / "tokenizer.json").read_bytes()


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="not the model's") as caught:
        resolve(spec(*ADDED, vocab_size=400))
    assert "<|image|> 400" in str(caught.value)
    with pytest.raises(InputError, match="do not fit"):
        resolve(spec(vocab_size=100))


def test_another_end_token_is_refused() -> None:
    with pytest.raises(InputError, match="ends texts with another token") as caught:
        resolve(spec(end=0))
    assert "<|im_end|>" in str(caught.value)


def test_vocabulary_and_merges_alone_are_no_chat_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="no tokenizer"):
        resolve(spec(), tmp_path)


def test_an_added_token_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InputError, match="surrogate") as caught:
        resolve(spec("<|image|>", "\ud800"))
    assert "added tokens" in caught.value.where
