"""Fixtures of the runtime's tests: recorded data, a tiny bundle, and CLIP's tokenizer from its published merges."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_export.export.tokenizer_files import find_open_clip_merges, tokenizer_json_from_bpe_merges
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import TextSpec

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def clip_merges() -> Path:
    path = find_open_clip_merges()
    assert path is not None, "the tests need open_clip_torch for CLIP's vocabulary"
    return path


@pytest.fixture(scope="session")
def clip_text_spec() -> TextSpec:
    return TextSpec(context_length=77, vocab_size=49408, end_token_id=49407, pad_token_id=0, cleaning="openai")


@pytest.fixture(scope="session")
def clip_tokenizer_json(clip_merges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer_json_from_bpe_merges(clip_merges), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def clip_tokenizer(clip_tokenizer_json: Path, clip_text_spec: TextSpec) -> Tokenizer:
    return Tokenizer(clip_tokenizer_json, clip_text_spec)
