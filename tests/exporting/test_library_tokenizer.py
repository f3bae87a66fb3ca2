"""Tokenizers as transformers saves and reads them: the bundle's gives the same ids, and so do its published files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from vlm_export.errors import InputError
from vlm_export.exporting.tokenizers.files import ResolvedTokenizer, find_open_clip_merges, resolve_tokenizer
from vlm_export.exporting.tokenizers.openai_bpe import vocab_from_bpe_merges
from vlm_export.family import Checkpoint
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import TextSpec

TEXTS = (
    "",
    "a photo of a zurgle and <sks> cat",
    "A PHOTO OF A ZURGLE,<sks>AND <SKS>",
    "crème brûlée, naïve façade, e\u0301",
    "a photo of <|endoftext|> a dog [SEP] [MASK] <|startoftext|>",
    "雨の中を歩く人々",
    "a cake 🎂 for 👩‍👩‍👧‍👦 and a flag 🇫🇷",
    "bell\x07 null\x00 escape\x1b[31m delete\x7f",
    "tabs\tand\nnew\r\nlines   and \u00a0 spaces ",
    "cafÃ© â€œquotedâ€\x9d",
    "fish &amp; chips &lt;b&gt; &#x41;",
    "3.14159 × 22:45, 1,000,000 ½ ²",
    "w" * 300,
    "שלום עולם مرحبا",
    "it's they'll we've I'm",
    "word " * 200,
)
# CLIP's own vocabulary, cut after its first 4,000 merges: what is compared are rules, and reading it takes less long.
CLIP_ROWS = 4_514
CLIP_SPEC = TextSpec(77, CLIP_ROWS, CLIP_ROWS - 1, CLIP_ROWS - 1, "none")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "A", "PHOTO", "photo", "##s")
BERT_SPEC = TextSpec(64, len(WORDS), 3, 0, "none", pooling="first_token")


@pytest.fixture(scope="module")
def clip() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The first of CLIP's vocabulary and merges."""
    merges = find_open_clip_merges()
    assert merges is not None, "the tests need open_clip_torch for CLIP's vocabulary"
    return vocab_from_bpe_merges(merges, vocab_size=CLIP_ROWS)


Build = Callable[[Path, Any], tuple[str, TextSpec]]


def slow_clip_with_added_tokens(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    """As transformers 4 saves a slow tokenizer: tokens that were added stand in a file of their own."""
    write_clip_files(folder, clip)
    (folder / "added_tokens.json").write_text('{"<sks>": 4514, "zurgle": 4515}', encoding="utf-8")
    return "clip", replace(CLIP_SPEC, vocab_size=CLIP_ROWS + 2)


def slow_clip_with_a_special_tokens_map(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    write_clip_files(folder, clip)
    (folder / "added_tokens.json").write_text('{"<sks>": 4514, "<pad>": 4515}', encoding="utf-8")
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<sks>"], "eos_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return "clip", replace(CLIP_SPEC, vocab_size=CLIP_ROWS + 2)


def fast_clip_with_flagged_tokens(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    tokenizer = CLIPTokenizer(vocab=clip[0], merges=clip[1], model_max_length=77)
    tokenizer.add_tokens([AddedToken("zurgle", single_word=True), AddedToken("<sks>", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("AND", normalized=False)]})
    tokenizer.save_pretrained(folder)
    return "clip", replace(CLIP_SPEC, vocab_size=CLIP_ROWS + 3)


def clip_that_pads_and_cuts_itself(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    tokenizer = CLIPTokenizer(vocab=clip[0], merges=clip[1], model_max_length=32, truncation_side="left")
    tokenizer.backend_tokenizer.enable_padding(length=40, pad_id=5, pad_token="&")
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(folder)
    return "clip", CLIP_SPEC


def clip_that_keeps_capitals(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    """A class that takes tokenizer.json as it stands."""
    rust = CLIPTokenizer(vocab=clip[0], merges=clip[1]).backend_tokenizer
    rust.normalizer = None
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    PreTrainedTokenizerFast(tokenizer_object=rust, model_max_length=77, **named).save_pretrained(folder)
    return "clip", CLIP_SPEC


def clip_whose_normalizer_its_class_ignores(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    """CLIPTokenizer of transformers 5 makes letters lower case whatever tokenizer.json says."""
    clip_that_keeps_capitals(folder, clip)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "CLIPTokenizerFast"}))
    return "clip", CLIP_SPEC


def cased_bert_from_its_vocabulary(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "strip_accents": true}', encoding="utf-8")
    return "blip", BERT_SPEC


def bert_with_other_special_tokens(folder: Path, clip: Any) -> tuple[str, TextSpec]:
    words = ("a", "b", "<unk>", "<s>", "</s>", "<pad>", "<mask>", "##a", "photo")
    named = {"unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    vocab = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocab, mask_token="<mask>", model_max_length=64, **named).save_pretrained(folder)
    return "blip", replace(BERT_SPEC, vocab_size=len(words), end_token_id=8, pad_token_id=0)


def write_clip_files(folder: Path, clip: Any) -> None:
    (folder / "vocab.json").write_text(json.dumps(clip[0]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in clip[1])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 77}', encoding="utf-8")


def resolved(folder: Path, model_type: str, spec: TextSpec, **options: Any) -> ResolvedTokenizer:
    side_files = {path.name: path for path in folder.iterdir() if path.name != "config.json"}
    config = {"model_type": model_type}
    source = Checkpoint(
        str(folder), "hf_directory", (), {}, lambda key: pytest.fail(key), config=config, side_files=side_files
    )
    return resolve_tokenizer(source, None, spec, **options)


KINDS = (
    slow_clip_with_added_tokens,
    slow_clip_with_a_special_tokens_map,
    fast_clip_with_flagged_tokens,
    clip_that_pads_and_cuts_itself,
    clip_that_keeps_capitals,
    clip_whose_normalizer_its_class_ignores,
    cased_bert_from_its_vocabulary,
    bert_with_other_special_tokens,
)


@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_ids_are_those_of_transformers(build: Build, clip: Any, tmp_path: Path) -> None:
    source, bundle = tmp_path / "source", tmp_path / "bundle"
    source.mkdir()
    bundle.mkdir()
    model_type, spec = build(source, clip)
    (source / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    found = resolved(source, model_type, spec)
    for name, content in found.files.items():
        (bundle / name).write_bytes(content)
    (bundle / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")

    theirs = AutoTokenizer.from_pretrained(source)
    limit = {"truncation": True, "max_length": found.text.context_length}
    wanted = theirs(list(TEXTS), padding=True, return_token_type_ids=False, **limit)
    ids, mask = Tokenizer(bundle / "tokenizer.json", found.text).encode_masked(TEXTS, truncate=True)
    assert ids.tolist() == wanted["input_ids"]
    assert mask.tolist() == wanted["attention_mask"]
    assert found.text.context_length == min(spec.context_length, theirs.model_max_length)
    published = AutoTokenizer.from_pretrained(bundle)
    again = published(list(TEXTS), padding=True, truncation=True, return_token_type_ids=False)
    assert again["input_ids"] == wanted["input_ids"]
    assert published.model_max_length == found.text.context_length
    assert published.pad_token_id == found.text.pad_token_id
    assert not found.warnings


@pytest.mark.parametrize(
    ("build", "case", "pad", "end"),
    [
        (slow_clip_with_a_special_tokens_map, "lower", 4515, 4513),
        (clip_that_keeps_capitals, "kept", 0, 4513),
        (cased_bert_from_its_vocabulary, "kept", 0, 3),
        (bert_with_other_special_tokens, "lower", 5, 4),
    ],
)
def test_the_spec_says_what_the_tokenizer_does(
    build: Build, case: str, pad: int, end: int, clip: Any, tmp_path: Path
) -> None:
    found = resolved(tmp_path, *build(tmp_path, clip))
    assert (found.text.case, found.text.pad_token_id, found.text.end_token_id) == (case, pad, end)
    assert found.origins.values["text.case"].startswith(("vocab.json, as", "tokenizer.json, as", "vocab.txt, as"))
    assert "pad_token in " in found.origins.values["text.pad_token_id"]


def test_tokens_that_the_files_do_not_tell_are_missed(clip: Any, tmp_path: Path) -> None:
    """The embedding has rows for two tokens more; without added_tokens.json nobody knows which."""
    _, spec = slow_clip_with_added_tokens(tmp_path, clip)
    padded = resolved(tmp_path, "clip", replace(spec, vocab_size=4_600))
    assert "4600 rows" in padded.warnings[0]
    assert "4516 ids" in padded.warnings[0]
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(InputError, match="not the model's") as caught:
        resolved(tmp_path, "clip", spec)
    assert "4516" in str(caught.value)
    assert "4514 ids" in str(caught.value)
    assert "added_tokens.json" in caught.value.fix
    assert not resolved(tmp_path, "clip", spec, reserved_rows=2).warnings
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "no text reaches the last 2 rows" in resolved(tmp_path, "clip", spec).warnings[0]


def test_more_ids_than_rows_are_refused(clip: Any, tmp_path: Path) -> None:
    slow_clip_with_added_tokens(tmp_path, clip)
    with pytest.raises(InputError, match="do not fit") as caught:
        resolved(tmp_path, "clip", CLIP_SPEC)
    assert "ids below 4514" in caught.value.expected
    assert "4515" in caught.value.got


@pytest.mark.parametrize(
    ("fields", "pooling", "says"),
    [
        ({"padding_side": "left"}, "end_token", "pads texts on the left"),
        ({"padding_side": "left"}, "first_token", "pads texts on the left"),
        ({"pad_token": "<pad>"}, "highest_id", "padding has a higher one"),
        ({"split_special_tokens": True}, "end_token", "splits the strings of special tokens"),
        ({"model_max_length": 0}, "end_token", "longest text"),
        ({"model_max_length": "77"}, "end_token", "is malformed"),
        ({"tokenizer_class": "T5Tokenizer"}, "end_token", "class is not supported"),
        ({"tokenizer_class": "SiglipTokenizer"}, "end_token", "SentencePiece model, which is not there"),
        ({"tokenizer_class": 3}, "end_token", "is malformed"),
        ({"added_tokens_decoder": {"-1": {"content": "x"}}}, "end_token", "is malformed"),
        ({"added_tokens_decoder": {"1": "x"}}, "end_token", "is malformed"),
        ({"pad_token": {"content": 5}}, "end_token", "is malformed"),
        ({"eos_token": "<|startoftext|>"}, "end_token", "does not end texts"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    fields: dict[str, Any], pooling: Any, says: str, clip: Any, tmp_path: Path
) -> None:
    write_clip_files(tmp_path, clip)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    if fields.get("pad_token") == "<pad>":
        (tmp_path / "added_tokens.json").write_text('{"<pad>": 4514}', encoding="utf-8")
    rows = CLIP_ROWS + (fields.get("pad_token") == "<pad>")
    with pytest.raises(InputError, match=says) as caught:
        resolved(tmp_path, "clip", replace(CLIP_SPEC, vocab_size=rows, pooling=pooling))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("cleaning", ["none", "whitespace"])
def test_a_shorter_limit_than_the_context_of_a_model_that_sees_its_padding(
    cleaning: Any, clip: Any, tmp_path: Path
) -> None:
    """It is refused where the library follows it; open_clip's own cleaning takes no note of it."""
    write_clip_files(tmp_path, clip)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16}), encoding="utf-8")
    spec = replace(CLIP_SPEC, pooling="last_token", padding="context", cleaning=cleaning)
    if cleaning == "none":
        with pytest.raises(InputError, match="which sees its padding") as caught:
            resolved(tmp_path, "clip", spec)
        assert (caught.value.expected, caught.value.got) == ("77", "16")
    else:
        assert resolved(tmp_path, "clip", spec).text.context_length == 77


def test_fields_that_name_code_or_files_reach_nobody(clip: Any, tmp_path: Path) -> None:
    write_clip_files(tmp_path, clip)
    named = {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "chat_template": "{{ 1 }}",
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd",
        "fast_tokenizer_files": ["tokenizer.9.9.9.json"],
        "init_inputs": ["/etc/passwd"],
        "gguf_file": "x.gguf",
        "backend": "python",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    files = resolved(tmp_path, "clip", CLIP_SPEC).files
    assert not set(named) & set(json.loads(files["tokenizer_config.json"]))
    assert b"passwd" not in b"".join(files.values())
