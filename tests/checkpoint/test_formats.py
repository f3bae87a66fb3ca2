"""Every supported form gives the same tensors, names, dtypes and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.family import Checkpoint

Weights = dict[str, torch.Tensor]


def assert_holds(checkpoint: Checkpoint, weights: Weights) -> None:
    assert set(checkpoint.tensors) == set(weights)
    for key, expected in weights.items():
        info, found = checkpoint.tensors[key], checkpoint.read(key)
        assert (info.shape, f"torch.{info.dtype}") == (tuple(expected.shape), str(expected.dtype))
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def write_sharded(directory: Path, weights: Weights, ending: str) -> dict[str, str]:
    """Two shards and their index; returns the index's weight_map."""
    pickled = ending == "bin"
    stem = "pytorch_model" if pickled else "model"
    keys = sorted(weights)
    weight_map = {}
    for number, part in enumerate((keys[:2], keys[2:]), start=1):
        name = f"{stem}-0000{number}-of-00002.{ending}"
        chosen = {key: weights[key] for key in part}
        if pickled:
            torch.save(chosen, directory / name)
        else:
            save_file(chosen, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_safetensors(safetensors_file: Path, weights: Weights) -> None:
    checkpoint = open_checkpoint(str(safetensors_file))
    assert checkpoint.format == "safetensors"
    assert_holds(checkpoint, weights)
    (file,) = checkpoint.files
    raw = safetensors_file.read_bytes()
    assert (file.name, file.size_bytes) == (safetensors_file.name, len(raw))
    assert file.sha256 == hashlib.sha256(raw).hexdigest()


def test_state_dict(state_dict_file: Path, weights: Weights) -> None:
    checkpoint = open_checkpoint(str(state_dict_file))
    assert checkpoint.format == "state_dict"
    assert_holds(checkpoint, weights)


def test_legacy_state_dict(tmp_path: Path, weights: Weights) -> None:
    path = tmp_path / "legacy.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert_holds(open_checkpoint(str(path)), weights)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_state_dict(tmp_path: Path, weights: Weights, wrapper: str) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save({wrapper: weights, "epoch": 3}, path)
    assert_holds(open_checkpoint(str(path)), weights)


def test_other_contents_are_listed(tmp_path: Path, weights: Weights, refusal: Callable[..., str]) -> None:
    path = tmp_path / "trainer.pt"
    torch.save({"model": {**weights, "epoch": 3, "net": {}}}, path)
    message = refusal(path)
    assert "net (dict)" in message
    assert "epoch (int)" in message


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(1000), torch.eye(3).to_sparse()], ids=["expanded", "sparse"])
def test_tensors_that_are_not_plain_are_refused(
    tmp_path: Path, tensor: torch.Tensor, refusal: Callable[..., str]
) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"odd": tensor}, path)
    assert "tensor odd" in refusal(path)


@pytest.mark.parametrize("variant", ["vit_w128", "rn_tiny"])
def test_torchscript_archive(clip_data: Path, variant: str) -> None:
    path = clip_data / variant / "jit_archive.pt"
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.format == "torchscript"
    with pytest.warns(FutureWarning, match="torch.jit.load"):
        # torch.jit.load has no annotations.
        expected = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    assert_holds(checkpoint, expected)


def test_config_and_side_files_of_a_directory(tmp_path: Path, weights: Weights) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("not read")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.format == "hf_directory"
    assert checkpoint.config == {"model_type": "clip"}
    assert dict(checkpoint.side_files) == {"tokenizer.json": tmp_path / "tokenizer.json"}
    assert [file.name for file in checkpoint.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_holds(checkpoint, weights)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(tmp_path: Path, weights: Weights, ending: str) -> None:
    write_sharded(tmp_path, weights, ending)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_holds(checkpoint, weights)
    assert len(checkpoint.files) == 3


def test_index_file_itself(tmp_path: Path, weights: Weights) -> None:
    write_sharded(tmp_path, weights, "safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors.index.json"))
    assert checkpoint.format == "safetensors"
    assert_holds(checkpoint, weights)


def test_directory_with_one_file(safetensors_file: Path, weights: Weights) -> None:
    assert_holds(open_checkpoint(str(safetensors_file.parent)), weights)


def test_directory_with_several_files(
    tmp_path: Path, safetensors_file: Path, state_dict_file: Path, refusal: Callable[..., str]
) -> None:
    message = refusal(tmp_path)
    assert safetensors_file.name in message
    assert state_dict_file.name in message


def test_links_as_in_a_hub_cache(tmp_path: Path, weights: Weights) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(weights, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    assert_holds(open_checkpoint(str(snapshot)), weights)


def test_progress_reaches_the_size(safetensors_file: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    open_checkpoint(str(safetensors_file), progress=lambda *call: calls.append(call))
    size = safetensors_file.stat().st_size
    assert calls[-1] == (safetensors_file.name, size, size)
