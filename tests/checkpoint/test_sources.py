"""How SOURCE is resolved, and what happens without a network."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.bundle.cache_directory import cache_directory
from vlm_export.bundle.staging import put_file, staging
from vlm_export.checkpoint.names import is_hub_id
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources import hub
from vlm_export.checkpoint.sources.download import cached_path, fetch_url
from vlm_export.checkpoint.sources.hub import wanted_files
from vlm_export.errors import EnvironmentFailure, InputError, UsageError

Refusal = Callable[..., str]
URL = "https://models.invalid/clip/Tiny.pt"


@pytest.mark.parametrize(
    "source", ["", "no-such-name", "./missing/model.pt", "missing/model.pt", "a/b/c", "../x/y", "a--b/c", "x\0y"]
)
def test_unknown_sources(source: str) -> None:
    with pytest.raises(UsageError, match=r"no file, no directory, no known name|no such file or directory"):
        open_checkpoint(source)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint("clip-vit-b32")
    assert "clip-vit-b-32" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("openai/clip-vit-base-patch32", True), ("a/b", True), ("a/b/c", False), ("a", False), ("../b", False),
     ("a/..", False), ("a/b c", False), ("https://a/b", False)],
)  # fmt: skip
def test_hub_ids(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_a_path_goes_before_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    save_file(weights, tmp_path / "owner" / "name" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert set(open_checkpoint("owner/name").tensors) == set(weights)


def test_options_that_do_not_apply(tmp_path: Path, safetensors_file: Path, refusal: Refusal) -> None:
    assert "revision" in refusal(safetensors_file, status=2, revision="main")
    refusal(tmp_path / "missing", status=2)


def test_special_files(tmp_path: Path, refusal: Refusal) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a directory" in refusal(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    assert "no weights" in refusal(tmp_path / "empty")


# Downloads
class FakeResponse(io.BytesIO):
    def __init__(self, body: bytes, stated: int | None = None, url: str = URL) -> None:
        super().__init__(body)
        self.headers = {"Content-Length": str(len(body) if stated is None else stated)}
        self.url = url

    def geturl(self) -> str:
        return self.url


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Serves one response for every address, or raises it; returns the addresses that were asked for."""
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))

    def start(answer: Callable[[], FakeResponse] | Exception) -> list[str]:
        asked: list[str] = []

        def urlopen(url: str, timeout: float) -> FakeResponse:
            asked.append(url)
            if isinstance(answer, Exception):
                raise answer
            return answer()

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return start


def left_over(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def test_download_is_cached(serve: Callable[..., list[str]]) -> None:
    body = b"weights" * 1000
    sha256 = hashlib.sha256(body).hexdigest()
    asked = serve(lambda: FakeResponse(body))
    calls: list[tuple[str, int, int]] = []
    path = fetch_url(URL, sha256, lambda *call: calls.append(call))
    assert path.read_bytes() == body
    assert calls[-1] == ("Tiny.pt", len(body), len(body))
    assert fetch_url(URL, sha256) == path
    assert asked == [URL]
    path.write_bytes(b"damaged")
    # What a killed process left.
    (path.parent / ".Tiny.pt.vlm-export-1-0123456789ab.tmp").write_bytes(b"half")
    assert fetch_url(URL, sha256).read_bytes() == body
    assert len(asked) == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["Tiny.pt"]


def test_a_download_waits_for_that_of_another_process(serve: Callable[..., list[str]], harness: ModuleType) -> None:
    body = b"weights" * 1000
    sha256, asked = hashlib.sha256(body).hexdigest(), serve(lambda: FakeResponse(b"not asked for"))
    target = cached_path(URL, sha256)
    target.parent.mkdir(parents=True)

    def download(ready: Callable[[], None]) -> None:
        with staging(target) as staged:
            staged.path.write_bytes(body)
            ready()
            time.sleep(0.5)
            put_file(staged.path, target)

    with harness.running(download):
        assert fetch_url(URL, sha256).read_bytes() == body
    assert asked == []


def test_download_with_another_sha256(serve: Callable[..., list[str]], tmp_path: Path) -> None:
    serve(lambda: FakeResponse(b"something else"))
    with pytest.raises(InputError, match="sha256 differs"):
        fetch_url(URL, "0" * 64)
    assert not left_over(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        urllib.error.URLError("Name or service not known"),
        TimeoutError("timed out"),
        lambda: FakeResponse(b"half", stated=8),
        lambda: FakeResponse(b"plain", url="http://models.invalid/Tiny.pt"),
        lambda: FakeResponse(b"huge", stated=1 << 60),
    ],
    ids=["no network", "timeout", "cut off", "redirect", "too large"],
)
def test_download_that_fails(answer: Any, serve: Callable[..., list[str]], tmp_path: Path) -> None:
    serve(answer)
    with pytest.raises(EnvironmentFailure) as caught:
        fetch_url(URL, "0" * 64)
    assert caught.value.fix
    assert not left_over(tmp_path)


@pytest.mark.parametrize("url", ["http://models.invalid/x.pt", "file:///etc/passwd", "https://models.invalid/"])
def test_addresses_that_are_refused(url: str, serve: Callable[..., list[str]]) -> None:
    asked = serve(lambda: FakeResponse(b""))
    with pytest.raises((UsageError, InputError)):
        fetch_url(url, None)
    assert not asked


def test_known_name_without_network(serve: Callable[..., list[str]]) -> None:
    asked = serve(urllib.error.URLError("Name or service not known"))
    with pytest.raises(EnvironmentFailure) as caught:
        open_checkpoint("clip-rn50")
    assert "RN50.pt" in asked[0]
    assert "by other means" in caught.value.fix


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLM_EXPORT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "vlm-export"


# Hub
def test_wanted_files() -> None:
    names = ["README.md", "evil.py", "config.json", "pytorch_model.bin", "model.safetensors", "tokenizer.json"]
    assert wanted_files(names) == ["config.json", "tokenizer.json", "model.safetensors"]
    shards = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-x.safetensors"]
    assert wanted_files(shards) == ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    with pytest.raises(InputError, match="no weights"):
        wanted_files(["tf_model.h5", "config.json"])


def test_wanted_files_of_a_lora_adapter() -> None:
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "tokenizer.json"]
    assert wanted_files(names) == ["adapter_config.json", "tokenizer.json", "adapter_model.safetensors"]


def test_wanted_files_of_open_clip() -> None:
    own = ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"]
    assert wanted_files(own) == ["open_clip_config.json", "tokenizer.json", "open_clip_model.safetensors"]
    # Where the publisher converted the weights for transformers, these are taken, as ever.
    assert wanted_files([*own, "model.safetensors"])[-1] == "model.safetensors"


def test_open_clip_config_is_read_beside_weights_that_it_describes(tmp_path: Path, refusal: Refusal) -> None:
    weights = {"visual.conv1.weight": torch.zeros(8, 3, 4, 4), "token_embedding.weight": torch.zeros(5, 8)}
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        save_file(weights, tmp_path / name)
    for source in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        checkpoint = open_checkpoint(str(source))
        assert checkpoint.side_configs == {"open_clip_config.json": {"model_cfg": {"quick_gelu": True}}}
        assert [file.name for file in checkpoint.files] == ["open_clip_model.safetensors", "open_clip_config.json"]
    # Others in the same directory are not its: neither their files nor what they are change.
    save_file({"visual_projection.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.side_configs == {}
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": 1, "model_cfg": 2}')
    assert "stands twice" in refusal(tmp_path / "open_clip_model.safetensors")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN_OFFLINE = """
import sys
import time
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import VlmExportError
for source in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(source)
        print(checkpoint.revision, checkpoint.source, sorted(checkpoint.tensors)[0])
    except VlmExportError as error:
        print(error.exit_status, error.fix)
"""


def test_hub_without_network(tmp_path: Path, safetensors_file: Path) -> None:
    repository = tmp_path / "models--owner--cached"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copy(safetensors_file, snapshot / "model.safetensors")
    # huggingface_hub reads both variables when it is imported, hence a process of its own.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", OPEN_OFFLINE, "owner/cached", "owner/missing"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    cached, missing = done.stdout.splitlines()
    assert cached == f"{COMMIT} owner/cached a.bias"
    assert missing.startswith("4 connect to the network")


def test_hub_takes_one_commit_and_the_allowed_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, safetensors_file: Path
) -> None:
    import huggingface_hub

    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    shutil.copy(safetensors_file, snapshot / "model.safetensors")
    asked: dict[str, Any] = {}

    names = ["model.safetensors", "pytorch_model.bin", "modeling_evil.py"]
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/name", revision="main")
    assert checkpoint.revision == COMMIT
    assert asked == {"hub_id": "owner/name", "revision": COMMIT, "allow_patterns": ["model.safetensors"]}


def test_hub_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFailure, match="huggingface_hub"):
        hub.fetch_snapshot("owner/name")
