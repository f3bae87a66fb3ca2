"""Folders as trainers leave them: weights of any suffix beside config.json, runs of checkpoints, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.checkpoint.open import open_checkpoint

Refusal = Callable[..., str]
Weights = dict[str, torch.Tensor]


@pytest.mark.parametrize("name", ["best.ckpt", "weights.bin", "epoch_3.pth", "last.pt"])
def test_weights_beside_a_config(tmp_path: Path, weights: Weights, name: str) -> None:
    torch.save({"state_dict": weights, "epoch": 1}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    torch.save({}, tmp_path / "training_args.bin")
    torch.save({}, tmp_path / "optimizer.pt")
    for source in (tmp_path, tmp_path / name):
        checkpoint = open_checkpoint(str(source))
        assert (checkpoint.config, set(checkpoint.tensors)) == ({"model_type": "clip"}, set(weights))
        assert (checkpoint.format, set(checkpoint.side_files)) == ("hf_directory", {"tokenizer_config.json"})
        assert [file.name for file in checkpoint.files] == ["config.json", name, "tokenizer_config.json"]


def test_the_named_one_of_several_weights(tmp_path: Path, weights: Weights, refusal: Refusal) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        torch.save({"state_dict": weights}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "best.ckpt, last.ckpt" in message
    assert "name the weights file itself" in message
    assert open_checkpoint(str(tmp_path / "last.ckpt")).config == {}


@pytest.mark.parametrize("key", ["visual.conv1.weight", "module.visual.proj", "visual_encoder.cls_token"])
def test_a_config_that_cannot_be_meant(tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("{")
    assert open_checkpoint(str(tmp_path / "x.safetensors")).config is None


def test_a_run_of_checkpoints(tmp_path: Path, weights: Weights, refusal: Refusal) -> None:
    for step in (500, 1000, 9, 2000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 2000:
            save_file(weights, folder / "model.safetensors")
    (tmp_path / "runs").mkdir()
    message = refusal(tmp_path)
    assert f"name the newest checkpoint of this run: {tmp_path / 'checkpoint-1000'}" in message


def test_a_folder_of_folders(tmp_path: Path, weights: Weights, refusal: Refusal) -> None:
    assert "name a directory that holds weights" in refusal(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / "epoch_1.pt")
    assert f"such as {tmp_path / 'checkpoints'}" in refusal(tmp_path)
