"""`inspect` of known names: what the config says, without any network."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from vlm_export.checkpoint.sources.download import cached_path
from vlm_export.checkpoint.sources.known import KnownSource, known_names, load_known
from vlm_export.checkpoint.sources.local import open_local
from vlm_export.errors import InputError

DATA = Path(__file__).parents[1] / "data"
Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, and whoever asks the network fails."""

    def refuse(*_: object, **options: Any) -> None:
        assert options.get("local_files_only"), "the network was asked"
        raise FileNotFoundError("nothing cached")

    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


def test_a_known_name_is_described_without_a_download(cli: Cli) -> None:
    data = cli("inspect", "clip-vit-b-32", "--json").data
    known = load_known("clip-vit-b-32")
    assert (data["what"], data["family"], data["format"], data["files"]) == ("checkpoint", "clip", None, [])
    assert data["architecture"] == known.architecture
    assert [part["name"] for part in data["parts"]] == ["vision", "text"]
    assert data["parts"][0]["parameters"] == 87_849_216
    assert data["tensors"]["size_bytes"] == 302_554_626
    stated = {key: data["known"][key] for key in ("title", "source", "sha256", "licence", "paper", "notes")}
    assert stated == {
        "title": known.title,
        "source": known.source.url,
        "sha256": known.sha256,
        "licence": known.licence,
        "paper": known.paper,
        "notes": None,
    }
    assert not any("tokenizer" in note for note in data["notes"])
    text = cli("inspect", "clip-vit-b-32").out
    for line in (
        "not on this machine",
        f"sha256: {known.sha256}",
        f"licence: {known.licence}",
        f"paper: {known.paper}",
    ):
        assert line in text


def test_a_hub_id_of_a_config_is_not_asked_for(cli: Cli) -> None:
    out = cli("inspect", "nanovlm-222m").out
    assert "source: lusxvr/nanoVLM-222M" in out
    assert "notes: the tokenizer is HuggingFaceTB/cosmo2-tokenizer" in out
    assert "30 x present.N.key float32 (batch, 3, total_sequence, 64)" in " ".join(out.split())
    assert max(map(len, out.splitlines())) < 1000


def test_what_is_here_is_read(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path) -> None:
    data = cli("inspect", "clip-demo", "--json").data
    assert (data["format"], data["known"]["licence"]) == ("state_dict", "Apache-2.0")
    assert [file["name"] for file in data["files"]] == ["clip-demo.pt", "tokenizer.json"]
    # A download of before; one that is not the pinned file is named as that, and not fetched again.
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    known = replace(load_known("clip-vit-b-32"), source=KnownSource(url="https://example.org/a.pt"), sha256=sha256)
    path = cached_path("https://example.org/a.pt", sha256)
    path.parent.mkdir(parents=True)
    shutil.copy(checkpoint, path)
    opened = open_local(known)
    assert opened is not None
    assert (opened.source, opened.files[0].sha256) == ("clip-vit-b-32", sha256)
    path.write_bytes(checkpoint.with_name("state_dict_fp32.pt").read_bytes())
    with pytest.raises(InputError):
        open_local(known)
    # The Hub's cache, whole and without weights.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(DATA / "minicpmv" / "v2_6"))
    data = cli("inspect", "minicpmv-2.6", "--json").data
    assert (data["source"], data["format"], data["revision"]) == ("minicpmv-2.6", "hf_directory", "v2_6")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert cli("inspect", "minicpmv-2.6", "--json").data["format"] is None


def test_known_names_are_listed(cli: Cli) -> None:
    entries = cli("inspect", "--json").data["checkpoints"]
    assert [entry["name"] for entry in entries] == list(known_names())
    assert all(entry["family"] and entry["title"] and entry["source"] for entry in entries)
    assert any(entry["licence"] == "MIT (code and weights of openai/CLIP)" for entry in entries)
    out = cli("inspect").out
    assert all(name in out for name in known_names())
    assert max(map(len, out.splitlines())) <= 80


def test_the_list_needs_neither_torch_nor_onnx(spawn: Callable[..., Any]) -> None:
    code = "for name in ('torch', 'onnx', 'onnx_ir', 'transformers'): sys.modules[name] = None"
    result = spawn("inspect", code=code, env={"COLUMNS": "120"})
    assert result.status == 0
    assert 80 < max(map(len, result.out.splitlines())) <= 120


def test_options_that_need_a_source(cli: Cli, pair: Path) -> None:
    cli("inspect", "--bundle", pair).refused(2, "image")
    cli("inspect", "--revision", "main").refused(2, "--revision")
    cli("inspect", "-o", "a.png").refused(2, "-o")


@pytest.mark.parametrize(("options", "licence"), [((), "Apache-2.0"), (("--random-weights", "1"), None)])
def test_a_bundle_names_the_licence(
    cli: Cli, tmp_path: Path, fast: tuple[str, ...], options: tuple[str, ...], licence: str | None
) -> None:
    target = tmp_path / "bundle"
    assert cli("export", "clip-demo", "-o", target, "--part", "text", "--quiet", *fast, *options).status == 0
    data = cli("inspect", target, "--json").data
    assert data["licence"] == licence
    assert (f"licence: {licence}" in cli("inspect", target).out) == (licence is not None)
