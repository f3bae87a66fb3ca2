"""The bundle's tokenizer files, from each place where a tokenizer can be."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer

from vlm_export.checkpoint.sources.known import packaged_path
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.tokenizers import files as tokenizer_files
from vlm_export.exporting.tokenizers.files import (
    find_open_clip_merges,
    tokenizer_json_from_bpe_merges,
)
from vlm_export.exporting.tokenizers.openai_bpe import MAX_FILE_BYTES
from vlm_export.family import Checkpoint
from vlm_export.specs import TextSpec

SPEC = TextSpec(context_length=77, vocab_size=49408, end_token_id=49407, pad_token_id=0, cleaning="openai")
NAMES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
CAT = [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.fixture(scope="module")
def merges() -> Path:
    path = find_open_clip_merges()
    assert path is not None, "the tests need open_clip_torch for CLIP's vocabulary"
    return path


@pytest.fixture(scope="module")
def clip_json(merges: Path) -> str:
    return tokenizer_json_from_bpe_merges(merges)


@pytest.fixture
def two_files(clip_json: str, tmp_path: Path) -> Path:
    """A directory with vocab.json and merges.txt, as transformers has them."""
    model = json.loads(clip_json)["model"]
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def resolve_tokenizer(source: Checkpoint, option: str | None, text: TextSpec) -> dict[str, bytes]:
    return dict(tokenizer_files.resolve_tokenizer(source, option, text).files)


def checkpoint(**side_files: Path) -> Checkpoint:
    def read(key: str) -> Any:
        raise AssertionError("a tokenizer needs no tensors")

    files = {name.replace("__", "."): path for name, path in side_files.items()}
    return Checkpoint("model.pt", "state_dict", (), {}, read, side_files=files)


def ids(files: dict[str, bytes], text: str = "A photo  of a CAT") -> list[int]:
    encoded: list[int] = RustTokenizer.from_str(files["tokenizer.json"].decode()).encode(text).ids
    return encoded


def test_openai_checkpoint_takes_the_vocabulary_of_open_clip() -> None:
    files = resolve_tokenizer(checkpoint(), None, SPEC)
    assert set(files) == NAMES
    assert ids(files) == CAT
    config = json.loads(files["tokenizer_config.json"])
    assert config["model_max_length"] == 77
    assert config["tokenizer_class"] == "CLIPTokenizer"
    assert json.loads(files["special_tokens_map.json"]) == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }


@pytest.mark.parametrize("compressed", [True, False])
def test_option_names_merges(compressed: bool, merges: Path, tmp_path: Path) -> None:
    path = tmp_path / ("any.txt.gz" if compressed else "any.txt")
    path.write_bytes(merges.read_bytes() if compressed else gzip.decompress(merges.read_bytes()))
    assert ids(resolve_tokenizer(checkpoint(), str(path), SPEC)) == CAT


def test_option_names_a_tokenizer_json_or_its_directory(clip_json: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(clip_json, encoding="utf-8")
    for option in (path, tmp_path):
        files = resolve_tokenizer(checkpoint(), str(option), SPEC)
        assert files["tokenizer.json"].decode() == clip_json


@pytest.mark.parametrize("name", ["clip-demo", "clip"])
def test_the_config_says_of_the_prefix_space_what_the_tokenizer_says(name: str, clip_json: str, tmp_path: Path) -> None:
    """transformers 4 sets its own default over the tokenizer.json's where the config says nothing, or otherwise."""
    text = packaged_path("demo/tokenizer.json").read_text(encoding="utf-8") if name == "clip-demo" else clip_json
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    spec = replace(SPEC, vocab_size=438, end_token_id=437) if name == "clip-demo" else SPEC
    config = json.loads(resolve_tokenizer(checkpoint(), str(tmp_path), spec)["tokenizer_config.json"])
    assert config["add_prefix_space"] is (name == "clip-demo")


def test_vocab_and_merges_give_the_same_tokenizer(two_files: Path, clip_json: str) -> None:
    from_option = resolve_tokenizer(checkpoint(), str(two_files), SPEC)
    from_side = resolve_tokenizer(
        checkpoint(vocab__json=two_files / "vocab.json", merges__txt=two_files / "merges.txt"), None, SPEC
    )
    assert from_option == from_side
    assert json.loads(from_option["tokenizer.json"]) == json.loads(clip_json)


def test_side_files_pass_through_without_code_and_templates(clip_json: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(clip_json, encoding="utf-8")
    given = {
        "auto_map": {"AutoTokenizer": ["evil--code.Tokenizer", None]},
        "chat_template": "{{ 1 }}",
        "name_or_path": "/home/someone",
        "model_max_length": 10**30,
        "pad_token": {"content": "!", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
    source = checkpoint(
        tokenizer__json=tmp_path / "tokenizer.json", tokenizer_config__json=tmp_path / "tokenizer_config.json"
    )
    files = resolve_tokenizer(source, None, SPEC)
    config = json.loads(files["tokenizer_config.json"])
    assert files["tokenizer.json"].decode() == clip_json
    assert not {"auto_map", "chat_template", "name_or_path"} & set(config)
    assert config["model_max_length"] == 77
    assert json.loads(files["special_tokens_map.json"])["pad_token"] == "!"


def test_transformers_reads_the_files_and_agrees(merges: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in resolve_tokenizer(checkpoint(), str(merges), SPEC).items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__.startswith("CLIPTokenizer")
    assert loaded(["A photo  of a CAT", "it's 10 café"])["input_ids"] == [
        CAT,
        ids({"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}, "it's 10 café"),
    ]
    assert loaded.model_max_length == 77


def test_no_tokenizer_anywhere_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (SPEC, TextSpec(20, 200, 199, 0, "openai")):
        monkeypatch.setattr(tokenizer_files, "find_open_clip_merges", lambda: None)
        with pytest.raises(UsageError, match="--no-tokenizer") as caught:
            resolve_tokenizer(checkpoint(), None, spec)
        assert caught.value.exit_status == 2
        assert "--tokenizer PATH" in str(caught.value)


def test_small_vocabulary_does_not_get_clip_s(merges: Path) -> None:
    small = TextSpec(20, 200, 199, 0, "openai")
    with pytest.raises(UsageError, match="vocabulary of 200"):
        resolve_tokenizer(checkpoint(), None, small)
    with pytest.raises(InputError, match="vocabulary of 200"):
        resolve_tokenizer(checkpoint(), str(merges), small)


def test_ids_beyond_the_vocabulary_are_refused(clip_json: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(clip_json, encoding="utf-8")
    with pytest.raises(InputError, match="do not fit"):
        resolve_tokenizer(checkpoint(tokenizer__json=path), None, TextSpec(77, 49407, 49406, 0, "none"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.json", b"\xff\xfe"),
        ("merges.txt", b"#version\na b c\n"),
        ("merges.txt", b""),
        ("merges.txt.gz", b"\x1f\x8b\x08\x00nonsense"),
        ("merges.txt.gz", gzip.compress(b"header\ni n\n", mtime=0)[:-9]),
        ("merges.txt.gz", gzip.compress(b"header\n" + b"a b\n" * 10, mtime=0)),
        ("merges.txt.gz", gzip.compress(bytes(MAX_FILE_BYTES + 1), mtime=0)),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        resolve_tokenizer(checkpoint(), str(path), SPEC)
    assert caught.value.exit_status == 3


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": "b"}', b'{"a": -1}', b"one two three"])
def test_broken_vocab_or_merges_are_named(name: str, content: bytes, two_files: Path) -> None:
    (two_files / name).write_bytes(content)
    if (name, content) == ("merges.txt", b""):
        # No merges at all: a valid tokenizer of single bytes.
        assert len(ids(resolve_tokenizer(checkpoint(), str(two_files), SPEC), "cat")) == 5
        return
    with pytest.raises(InputError, match=r"vocab\.json|merges\.txt"):
        resolve_tokenizer(checkpoint(), str(two_files), SPEC)


def test_missing_option_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        resolve_tokenizer(checkpoint(), str(tmp_path / "absent"), SPEC)
    with pytest.raises(UsageError, match="no tokenizer"):
        resolve_tokenizer(checkpoint(), str(tmp_path), SPEC)


def test_neither_torch_nor_open_clip_is_imported() -> None:
    code = (
        "import sys; from vlm_export.exporting.tokenizers.files import *;"
        "tokenizer_json_from_bpe_merges(find_open_clip_merges());"
        "print([n for n in ('torch', 'open_clip', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


def test_half_a_surrogate_pair_in_a_config_is_refused(clip_json: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(clip_json, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "\\ud800"}', encoding="utf-8")
    with pytest.raises(InputError, match="surrogate") as caught:
        resolve_tokenizer(checkpoint(), str(tmp_path), SPEC)
    assert "tokenizer_config.json" in caught.value.where


def test_a_path_that_no_system_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tokenizer names nothing"):
        resolve_tokenizer(checkpoint(), str(tmp_path / ("x" * 300)), SPEC)
