"""Fixtures of the runtime's tests: recorded data, a tiny bundle as a Model, and CLIP's tokenizer from its merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm_export import Model, load
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.exporting.tokenizers.files import find_open_clip_merges, tokenizer_json_from_bpe_merges
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.runtime.session import Session
from vlm_export.specs import TextSpec

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def tiny_bundle(data: Path) -> Path:
    """A tiny CLIP; not to be changed."""
    return data / "runtime" / "tiny_bundle"


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Model:
    """The tiny bundle as a Model; not to be changed."""
    return load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def model_with() -> Callable[..., Model]:
    """A bundle's Model with other fields in its manifest, as if the bundle had been exported so."""

    def build(bundle: Path, **fields: Any) -> Model:
        opened = open_bundle(bundle)
        manifest: Manifest = replace(opened.manifest, **fields)
        return Model(Session(OpenBundle(opened.root, manifest, manifest.to_bytes()), threads=1))

    return build


@pytest.fixture
def engine_put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model, str, Any], None]:
    """Puts an engine in the place of a part's until the test ends."""

    def put(model: Model, part: str, engine: Any) -> None:
        session, opened = model.session, model.session.engine
        monkeypatch.setattr(session, "engine", lambda name: engine if name == part else opened(name))

    return put


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
