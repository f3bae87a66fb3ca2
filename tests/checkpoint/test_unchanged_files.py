"""What was hashed is what is read: a file that is replaced or written to in between is an error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.seen_file import see_file
from vlm_export.errors import InputError
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.exporting.stages import SilentListener, Stages

Refusal = Callable[..., str]
Weights = dict[str, torch.Tensor]
CHANGED = "changed while it was read"


def replace(path: Path) -> None:
    """Another file of the same size takes its place."""
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def touch(path: Path) -> None:
    """As if it had been written to, at a time of its own whatever the clock's resolution is."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))


@pytest.fixture(params=["safetensors", "state_dict", "legacy", "torchscript"])
def file(request: pytest.FixtureRequest, tmp_path: Path, weights: Weights, writer: Any) -> Path:
    path = tmp_path / "weights"
    if request.param == "safetensors":
        save_file(weights, path)
    elif request.param == "torchscript":
        writer.archive(path, writer.module({"w": writer.tensor()}))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=request.param == "state_dict")
    return path


@pytest.mark.parametrize("change", [replace, touch])
def test_a_change_after_the_pinned_sha256_was_found(
    file: Path, change: Callable[[Path], None], refusal: Refusal
) -> None:
    def progress(_: str, done: int, total: int) -> None:
        if done == total:
            change(file)

    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert CHANGED in refusal(file, expected_sha256=sha256, progress=progress)


@pytest.mark.parametrize("change", [replace, touch])
def test_a_change_before_the_first_tensor(file: Path, change: Callable[[Path], None]) -> None:
    checkpoint = open_checkpoint(str(file))
    checkpoint.check_unchanged()
    change(file)
    with pytest.raises(InputError, match=CHANGED):
        checkpoint.read(next(iter(checkpoint.tensors)))


def test_a_change_after_the_last_tensor(file: Path) -> None:
    checkpoint = open_checkpoint(str(file))
    for key in checkpoint.tensors:
        checkpoint.read(key)
    checkpoint.check_unchanged()
    touch(file)
    with pytest.raises(InputError, match=CHANGED):
        checkpoint.check_unchanged()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "shard.safetensors"])
def test_every_file_of_a_directory_counts(tmp_path: Path, weights: Weights, name: str) -> None:
    save_file(weights, tmp_path / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "shard.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for other in ("config.json", "tokenizer.json"):
        (tmp_path / other).write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    checkpoint.check_unchanged()
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.check_unchanged()


def test_a_config_that_changes_before_it_is_hashed(tmp_path: Path, safetensors_file: Path, refusal: Refusal) -> None:
    index = safetensors_file.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(open_checkpoint(str(safetensors_file)).tensors, "w.st")}))
    safetensors_file.rename(tmp_path / "w.st")
    config = tmp_path / "config.json"
    config.write_text("{}")
    touched: list[str] = []

    def reads(_: Any) -> tuple[str, ...]:
        touched.append("once")
        touch(config)
        return ()

    assert CHANGED in refusal(tmp_path, reads=reads)
    assert touched == ["once"]


def test_a_pipe_in_the_place_of_a_file(safetensors_file: Path) -> None:
    seen = see_file(safetensors_file)
    safetensors_file.unlink()
    os.mkfifo(safetensors_file)
    with pytest.raises(InputError, match=CHANGED):
        seen.open()
    with pytest.raises(InputError, match="no regular file"):
        see_file(safetensors_file)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "x.pt"])
def test_pipes_are_not_opened(tmp_path: Path, name: str, refusal: Refusal) -> None:
    os.mkfifo(tmp_path / name)
    assert "neither a file nor a directory" in refusal(tmp_path / name)
    assert "no weights" in refusal(tmp_path)


def test_a_pipe_as_shard_or_config(tmp_path: Path, weights: Weights, refusal: Refusal) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "pipe")}))
    os.mkfifo(tmp_path / "pipe")
    assert "not there" in refusal(index)
    index.unlink()
    save_file(weights, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert open_checkpoint(str(tmp_path)).config is None


def test_nothing_is_published_from_a_file_that_changed(tmp_path: Path, clip_data: Path) -> None:
    source, target = tmp_path / "weights.pt", tmp_path / "out" / "bundle"
    source.write_bytes((clip_data / "vit_p14" / "state_dict_fp32.pt").read_bytes())

    class Writer(SilentListener):
        def started(self, name: str) -> None:
            if name == "record golden of text":
                touch(source)

    options = ExportOptions(opset=17, parts=("text",), with_tokenizer=False, simplify=False, threads=1)
    with pytest.raises(InputError, match=CHANGED):
        export_bundle(str(source), target, options, Stages(Writer()))
    assert not target.exists()
