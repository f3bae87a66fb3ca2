"""Shards that hold nothing that is read: not downloaded, not opened, not needed."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_export.checkpoint.formats.safetensors_file import everything, select_shards
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.hub import fetch_snapshot
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.source import open_source, source_record
from vlm_export.family import Checkpoint
from vlm_export.models.registry import recognise

MINICPMV = Path(__file__).parents[1] / "data" / "minicpmv" / "v2_6"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORMATS = {"safetensors": "model", "bin": "pytorch_model"}
Weights = dict[str, torch.Tensor]


def weights() -> list[Weights]:
    """Of three shards: the language model alone, both, the vision modules alone."""
    return [
        {"llm.a": torch.ones(2), "llm.b": torch.ones(3)},
        {"llm.c": torch.ones(2), "vpm.a": torch.full((2,), 2.0)},
        {"resampler.a": torch.full((3,), 3.0)},
    ]


def vision_alone(keys: Collection[str]) -> tuple[str, ...]:
    assert "llm.a" in keys
    return ("vpm.", "resampler.")


def shard_name(suffix: str, i: int, count: int = 3) -> str:
    return f"{FORMATS[suffix]}-{i:05}-of-{count:05}.{suffix}"


def write(folder: Path, shards: list[Weights], suffix: str) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = shard_name(suffix, i, len(shards))
        weight_map |= dict.fromkeys(shard, name)
        (save_file if suffix == "safetensors" else torch.save)(shard, folder / name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{FORMATS[suffix]}.{suffix}.index.json").write_text(index)
    return folder


@pytest.fixture(params=FORMATS)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sharded(tmp_path: Path, suffix: str) -> Path:
    return write(tmp_path / "checkpoint", weights(), suffix)


def assert_vision(checkpoint: Checkpoint, suffix: str) -> None:
    assert set(checkpoint.tensors) == {"llm.c", "vpm.a", "resampler.a"}
    assert checkpoint.shards_left_aside == (shard_name(suffix, 1),)
    names = [file.name for file in checkpoint.files]
    assert names == [f"{FORMATS[suffix]}.{suffix}.index.json", shard_name(suffix, 2), shard_name(suffix, 3)]
    assert checkpoint.read("vpm.a").tolist() == [2, 2]
    assert checkpoint.read("resampler.a").tolist() == [3, 3, 3]


@pytest.mark.parametrize("state", ["there", "absent", "damaged", "a folder"])
def test_a_shard_that_is_not_needed(sharded: Path, suffix: str, state: str) -> None:
    shard = sharded / shard_name(suffix, 1)
    if state != "there":
        shard.unlink()
    if state == "damaged":
        shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    if state == "a folder":
        shard.mkdir()
    hashed: list[str] = []
    checkpoint = open_checkpoint(str(sharded), reads=vision_alone, progress=lambda name, *_: hashed.append(name))
    assert_vision(checkpoint, suffix)
    assert shard.name not in hashed


def test_an_index_that_the_user_names(sharded: Path, suffix: str) -> None:
    (sharded / shard_name(suffix, 1)).unlink()
    assert_vision(open_checkpoint(str(next(sharded.glob("*.index.json"))), reads=vision_alone), suffix)


@pytest.mark.parametrize("absent", [2, 3])
def test_a_needed_shard_that_is_absent(sharded: Path, suffix: str, absent: int) -> None:
    (sharded / shard_name(suffix, absent)).unlink()
    with pytest.raises(InputError, match=rf"{shard_name(suffix, absent)}(.|\n)*2 shards are needed"):
        open_checkpoint(str(sharded), reads=vision_alone)


def test_without_a_rule_all_shards_are_needed(sharded: Path, suffix: str) -> None:
    assert open_checkpoint(str(sharded)).shards_left_aside == ()
    (sharded / shard_name(suffix, 1)).unlink()
    with pytest.raises(InputError, match="a shard that the index names is not there"):
        open_checkpoint(str(sharded))


def test_a_needed_shard_is_compared_with_the_index(sharded: Path, suffix: str) -> None:
    save = save_file if suffix == "safetensors" else torch.save
    save({"vpm.a": torch.ones(2)}, sharded / shard_name(suffix, 2))
    with pytest.raises(InputError, match=r"disagree|lack keys"):
        open_checkpoint(str(sharded), reads=vision_alone)


def test_a_shard_whose_name_no_file_can_have(sharded: Path) -> None:
    index = next(sharded.glob("*.index.json"))
    data = json.loads(index.read_text())
    for name in ("a" * 5000, "\u65e5" * 100):
        data["weight_map"]["llm.a"] = name
        index.write_text(json.dumps(data))
        with pytest.raises(InputError, match="too long for any file"):
            open_checkpoint(str(sharded))


def test_names_are_plain_also_of_shards_left_aside(sharded: Path) -> None:
    index = next(sharded.glob("*.index.json"))
    data = json.loads(index.read_text())
    data["weight_map"]["llm.a"] = "../x.bin"
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"x\.bin"):
        open_checkpoint(str(sharded), reads=vision_alone)


def test_a_pinned_sha256_is_of_the_one_shard_that_is_read(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path / "two", [weights()[0], weights()[2]], suffix)
    sha256 = open_checkpoint(str(folder), reads=vision_alone).files[-1].sha256
    assert open_checkpoint(str(folder), reads=vision_alone, expected_sha256=sha256).read("resampler.a").shape == (3,)
    with pytest.raises(InputError, match="sha256"):
        open_checkpoint(str(folder), reads=vision_alone, expected_sha256="0" * 64)
    with pytest.raises(UsageError, match="pins one weights file"):
        open_checkpoint(str(folder), expected_sha256=sha256)


def test_select_shards() -> None:
    shards = {"llm.a": "1", "vpm.a": "2", "llm.b": "2"}
    assert select_shards(shards, lambda _: ("vpm.",)) == ({"vpm.a": "2", "llm.b": "2"}, ("1",))
    assert select_shards(shards, everything) == (shards, ())


# Hub
def test_the_hub_is_asked_for_the_needed_shards(
    sharded: Path, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = sharded.rename(tmp_path / COMMIT)
    (snapshot / "config.json").write_text("{}")
    asked: list[list[str]] = []
    names = [path.name for path in snapshot.iterdir()] + ["modeling_evil.py"]
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(hub_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert revision == COMMIT
        asked.append(sorted(allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (snapshot / shard_name(suffix, 1)).unlink()
    checkpoint = open_checkpoint("owner/name", reads=vision_alone)
    assert checkpoint.shards_left_aside == (shard_name(suffix, 1),)
    index = f"{FORMATS[suffix]}.{suffix}.index.json"
    needed = sorted(["config.json", index, shard_name(suffix, 2), shard_name(suffix, 3)])
    assert asked == [[index], needed]
    fetch_snapshot("owner/name")
    assert asked[-1] == sorted([*needed, shard_name(suffix, 1)])


# The families' own rule, on a checkpoint of the oracle
@pytest.fixture
def minicpmv(tmp_path: Path, suffix: str) -> Path:
    """MiniCPM-V 2.6 in two shards, of which the language model's is not there."""
    tensors = load_file(MINICPMV / "model.safetensors")
    parts: list[Weights] = [{}, {}]
    for key, tensor in tensors.items():
        parts[not (key.startswith("llm.") and key != "llm.lm_head.weight")][key] = tensor
    folder = write(tmp_path / "minicpmv", parts, suffix)
    (folder / shard_name(suffix, 1, 2)).unlink()
    (folder / "config.json").write_bytes((MINICPMV / "config.json").read_bytes())
    return folder


def test_a_model_is_built_without_the_language_model(minicpmv: Path, suffix: str, tmp_path: Path) -> None:
    checkpoint = open_source(str(minicpmv), ExportOptions(), tmp_path, lambda *_: None)
    read: list[str] = []

    def recorded(key: str) -> torch.Tensor:
        read.append(key)
        return checkpoint.read(key)

    family = recognise(checkpoint)
    with ScratchStore(tmp_path / "weights.bin") as store:
        model = family.build(replace(checkpoint, read=recorded), store)
    assert checkpoint.shards_left_aside == (shard_name(suffix, 1, 2),)
    record = source_record(checkpoint, ExportOptions())
    assert record.shards_left_aside == checkpoint.shards_left_aside
    assert model.dropped_keys == ("llm.lm_head.weight",)
    assert read
    assert all(key.startswith(family.reads) for key in read)


def test_inspect_says_what_was_not_opened(minicpmv: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(minicpmv)]) == 0
    assert f"not opened: {shard_name(suffix, 1, 2)}" in capsys.readouterr().out
