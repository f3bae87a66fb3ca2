"""Damaged and hostile checkpoints at the command line: status 3, the real cause, and no bundle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.checkpoint.open import open_checkpoint

Cli = Callable[..., Any]
Weights = dict[str, torch.Tensor]
HTML = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.fixture
def weights(checkpoint: Path) -> Weights:
    opened = open_checkpoint(str(checkpoint))
    return {key: opened.read(key).clone() for key in opened.tensors}


@pytest.fixture
def refuse(cli: Cli, tmp_path: Path, fast: tuple[str, ...]) -> Callable[..., None]:
    """Exports what must be refused, and checks that nothing is left where the bundle would be."""

    def run(source: Path, *texts: str, options: tuple[str, ...] = ()) -> None:
        target = tmp_path / "out" / "bundle"
        cli("export", source, "-o", target, "--quiet", *fast, *options).refused(3, "where: ", "stage: ", *texts)
        assert not target.parent.exists()

    return run


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda raw: raw[: len(raw) // 2], "fix: "),
        (lambda raw: raw + b"\0", "bytes follow the last tensor"),
        (lambda raw: struct.pack("<Q", 1 << 60) + raw[8:], "header"),
        (lambda raw: HTML, "an HTML"),
        (lambda raw: LFS, "a Git LFS pointer"),
    ],
    ids=["truncated", "longer", "huge header", "page", "pointer"],
)
def test_damaged_safetensors(
    tmp_path: Path, weights: Weights, refuse: Cli, damage: Callable[[bytes], bytes], cause: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(damage(path.read_bytes()))
    refuse(path, cause, "fix: ")


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: HTML])
def test_damaged_state_dict(tmp_path: Path, checkpoint: Path, refuse: Cli, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(damage(checkpoint.read_bytes()))
    refuse(path, "fix: ")


class Sentinel:
    """Pickles to a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("bare", [False, True])
def test_reduce_is_not_executed(tmp_path: Path, weights: Weights, refuse: Cli, bare: bool) -> None:
    path, sentinel = tmp_path / "model.pt", tmp_path / "executed"
    if bare:
        path.write_bytes(pickle.dumps({"w": Sentinel(sentinel)}))
    else:
        torch.save({**weights, "w": Sentinel(sentinel)}, path)
    refuse(path, "fix: ")
    assert not sentinel.exists()


def test_deflate_bomb(tmp_path: Path, checkpoint: Path, refuse: Cli) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, bytes(64 << 20) if name.endswith("/data/0") else source.read(name))
    refuse(path, "compressed")


def test_flipped_bit_against_a_pinned_sha256(tmp_path: Path, checkpoint: Path, refuse: Cli) -> None:
    raw = bytearray(checkpoint.read_bytes())
    pinned = hashlib.sha256(raw).hexdigest()
    raw[len(raw) // 2] ^= 1
    path = tmp_path / "model.pt"
    path.write_bytes(raw)
    refuse(
        path,
        f"expected: sha256 {pinned}",
        f"got: sha256 {hashlib.sha256(raw).hexdigest()}",
        options=("--sha256", pinned),
    )


def test_missing_and_unexpected_keys(tmp_path: Path, weights: Weights, refuse: Cli) -> None:
    path = tmp_path / "model.pt"
    weights["visual.surprise"] = weights.pop("ln_final.bias")
    torch.save(weights, path)
    refuse(path, "missing: ln_final.bias", "unexpected: visual.surprise")
    torch.save({f"module.{key}": tensor for key, tensor in weights.items()}, path)
    refuse(path, "missing: ln_final.bias", "unexpected: visual.surprise")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, weights: Weights, refuse: Cli, value: float) -> None:
    path = tmp_path / "model.pt"
    weights["visual.proj"][1, :3] = value
    torch.save(weights, path)
    refuse(path, "visual.proj", "3 of")


def test_integer_weights(tmp_path: Path, weights: Weights, refuse: Cli) -> None:
    path = tmp_path / "model.pt"
    weights["visual.proj"] = weights["visual.proj"].to(torch.int8)
    torch.save(weights, path)
    refuse(path, "dtype: visual.proj", "int8")


@pytest.mark.parametrize(
    ("shard", "cause"), [("absent.safetensors", "not there"), ("../model.safetensors", "outside its directory")]
)
def test_damaged_shards(tmp_path: Path, weights: Weights, refuse: Cli, shard: str, cause: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, cause)


def test_remote_code_is_not_executed(
    tmp_path: Path, cli: Cli, make_huggingface_clip: Callable[..., Any], fast: tuple[str, ...]
) -> None:
    folder, sentinel = tmp_path / "model", tmp_path / "executed"
    make_huggingface_clip(folder)
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Model", "AutoConfig": "modeling_evil.Model"}
    config["_attn_implementation"] = "someone/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    assert cli("export", folder, "-o", tmp_path / "bundle", "--quiet", *fast).status == 0
    assert not sentinel.exists()
    published = (tmp_path / "bundle" / "config.json").read_text()
    assert "auto_map" not in published
    assert "someone/kernel" not in published


def test_template_named_outside(tmp_path: Path, make_huggingface_clip: Callable[..., Any], refuse: Cli) -> None:
    folder = tmp_path / "model"
    make_huggingface_clip(folder)
    template = [{"name": "../../outside", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    refuse(folder, "chat template")
    assert not list(tmp_path.rglob("*outside*"))
