"""Bad checkpoints, one group for each kind: status 3, the real cause named, nothing executed."""

from __future__ import annotations

import hashlib
import json
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
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError
from vlm_export.models.clip.family import ClipFamily
from vlm_export.models.registry import identify

Weights = dict[str, torch.Tensor]
Refusal = Callable[..., str]

HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


# Safetensors
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda raw: raw[:-1], "cut off"),
        (lambda raw: raw[:100], "cut off"),
        (lambda raw: raw + b"\0", "bytes follow the last tensor"),
        (lambda raw: struct.pack("<Q", 1 << 60) + raw[8:], f"header of {1 << 60} bytes"),
        (lambda raw: raw[:5], "few bytes"),
        (lambda raw: b"", "it is empty"),
        (lambda raw: bytes(len(raw)), "zero bytes"),
        (lambda raw: HTML, "HTML"),
        (lambda raw: LFS, "Git LFS pointer"),
        (lambda raw: raw.replace(b'"F32"', b'"Q32"'), "Q32"),
        (lambda raw: raw.replace(b'"shape":[5,3]', b'"shape":[5,9]'), "180 bytes"),
    ],
)
def test_damaged_safetensors(
    safetensors_file: Path, damage: Callable[[bytes], bytes], cause: str, refusal: Refusal
) -> None:
    safetensors_file.write_bytes(damage(safetensors_file.read_bytes()))
    message = refusal(safetensors_file)
    assert cause in message or (cause == "cut off" and "in a file of" in message)
    assert "fix:" in message


def test_overlapping_tensors(tmp_path: Path, refusal: Refusal) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "starts at byte 8" in refusal(path)


# .pt
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.9, -1])
def test_truncated_pt(tmp_path: Path, weights: Weights, legacy: bool, kept: float, refusal: Refusal) -> None:
    path = tmp_path / "x.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept) if isinstance(kept, float) else kept])
    assert "fix:" in refusal(path)


@pytest.mark.parametrize(("raw", "cause"), [(HTML, "HTML"), (LFS, "Git LFS"), (b'{"error": 1}', "JSON")])
def test_web_pages_and_lfs_pointers(tmp_path: Path, raw: bytes, cause: str, refusal: Refusal) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    assert cause in refusal(path)


def test_truncated_torchscript(tmp_path: Path, clip_data: Path, refusal: Refusal) -> None:
    raw = (clip_data / "vit_w128" / "jit_archive.pt").read_bytes()
    path = tmp_path / "x.pt"
    path.write_bytes(raw[: len(raw) // 2])
    assert "cut off" in refusal(path)


# __reduce__
@pytest.mark.parametrize("legacy", [False, True])
def test_reduce_in_a_state_dict(tmp_path: Path, sentinel: Any, legacy: bool, refusal: Refusal) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": sentinel}, path, _use_new_zipfile_serialization=not legacy)
    assert "mkdir" in refusal(path)


def test_no_environment_variable_lifts_the_protection(
    tmp_path: Path, sentinel: Any, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "x.pt"
    torch.save({"w": sentinel}, path)
    refusal(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reduce_in_a_torchscript_archive(
    tmp_path: Path, sentinel: Any, writer: Any, protocol: int, refusal: Refusal
) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arch/data.pkl", pickle.dumps({"w": sentinel}, protocol))
        archive.writestr("arch/constants.pkl", pickle.dumps(sentinel, protocol))
    assert "pickle" in refusal(path)


def test_bare_pickle(tmp_path: Path, sentinel: Any, refusal: Refusal) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(sentinel))
    assert "pickle that torch.save did not write" in refusal(path)


def test_reduce_in_a_directory(tmp_path: Path, sentinel: Any, refusal: Refusal) -> None:
    torch.save(sentinel, tmp_path / "pytorch_model.bin")
    assert "mkdir" in refusal(tmp_path)


# DEFLATE bombs
def test_deflate_bomb(tmp_path: Path, weights: Weights, state_dict_file: Path, refusal: Refusal) -> None:
    path = tmp_path / "bomb.pt"
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(state_dict_file) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            with bomb.open(name, "w") as member:
                if not name.endswith("/data/0"):
                    member.write(source.read(name))
                    continue
                for _ in range(100):
                    member.write(zeros)
    assert path.stat().st_size < 1 << 20
    assert "compressed members" in refusal(path)


def test_any_compression_of_a_state_dict(tmp_path: Path, state_dict_file: Path, refusal: Refusal) -> None:
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(state_dict_file) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert "deflated" in refusal(path)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "arch/../../x", "arch\\x", "alone", "other/x"])
def test_member_names(tmp_path: Path, state_dict_file: Path, name: str, refusal: Refusal) -> None:
    with zipfile.ZipFile(state_dict_file, "a") as archive:
        archive.writestr(name, b"x")
    assert "zip archive is not one that torch writes" in refusal(state_dict_file)


def test_stated_size_of_a_member(state_dict_file: Path, refusal: Refusal) -> None:
    with zipfile.ZipFile(state_dict_file) as archive:
        name = next(info.filename for info in archive.infolist() if info.filename.endswith("data/0"))
    raw = bytearray(state_dict_file.read_bytes())
    entry = raw.rindex(name.encode()) - 46
    assert raw[entry : entry + 4] == b"PK\1\2"
    raw[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    state_dict_file.write_bytes(raw)
    assert "data before byte" in refusal(state_dict_file)


# One payload bit flipped
@pytest.mark.parametrize("form", ["safetensors_file", "state_dict_file"])
def test_flipped_bit(form: str, request: pytest.FixtureRequest, refusal: Refusal) -> None:
    path: Path = request.getfixturevalue(form)
    raw = bytearray(path.read_bytes())
    sha256 = hashlib.sha256(raw).hexdigest()
    open_checkpoint(str(path), expected_sha256=sha256.upper())
    raw[-1 if form == "safetensors_file" else raw.index(b"data/0") + 70] ^= 1
    path.write_bytes(raw)
    open_checkpoint(str(path))
    message = refusal(path, expected_sha256=sha256)
    assert "sha256 differs" in message
    assert sha256 in message


# What the tensors are, checked when the family loads them
def clip_weights(clip_data: Path) -> Weights:
    checkpoint = open_checkpoint(str(clip_data / "vit_p14" / "state_dict_fp32.pt"))
    return {key: checkpoint.read(key).clone() for key in checkpoint.tensors}


def build_error(tmp_path: Path, weights: Weights) -> str:
    path = tmp_path / "changed.pt"
    torch.save(weights, path)
    checkpoint = open_checkpoint(str(path))
    with ScratchStore(tmp_path / "scratch") as store, pytest.raises(InputError) as caught:
        ClipFamily().build(checkpoint, store)
    return str(caught.value)


def test_missing_and_unexpected_keys(tmp_path: Path, clip_data: Path) -> None:
    weights = clip_weights(clip_data)
    del weights["ln_final.bias"]
    weights["visual.surprise"] = torch.zeros(2)
    weights["visual.ln_post.weight"] = torch.ones(3)
    message = build_error(tmp_path, weights)
    assert "missing: ln_final.bias" in message
    assert "unexpected: visual.surprise" in message
    assert "shape: visual.ln_post.weight" in message


def test_prefixed_keys(tmp_path: Path, clip_data: Path) -> None:
    weights = {f"module.{key}": tensor for key, tensor in clip_weights(clip_data).items()}
    path = tmp_path / "prefixed.pt"
    torch.save(weights, path)
    family, checkpoint = identify(open_checkpoint(str(path)))
    assert (family.name, set(checkpoint.tensors)) == ("clip", set(clip_weights(clip_data)))
    assert "module." in checkpoint.notes[0]


def test_one_prefixed_key(tmp_path: Path, clip_data: Path) -> None:
    weights = clip_weights(clip_data)
    weights["module.ln_final.bias"] = weights.pop("ln_final.bias")
    message = build_error(tmp_path, weights)
    assert "missing: ln_final.bias" in message
    assert "unexpected: module.ln_final.bias" in message


def test_known_leftovers_are_dropped(tmp_path: Path, clip_data: Path) -> None:
    weights = clip_weights(clip_data)
    leftovers = {"input_resolution", "context_length", "vocab_size"}
    weights |= dict.fromkeys(leftovers, torch.tensor(1))
    path = tmp_path / "x.pt"
    torch.save(weights, path)
    with ScratchStore(tmp_path / "scratch") as store:
        assert set(ClipFamily().build(open_checkpoint(str(path)), store).dropped_keys) == leftovers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, clip_data: Path, value: float) -> None:
    weights = clip_weights(clip_data)
    weights["token_embedding.weight"][3, :2] = value
    message = build_error(tmp_path, weights)
    assert "token_embedding.weight" in message
    assert "2 of" in message


def test_integer_weights(tmp_path: Path, clip_data: Path) -> None:
    weights = clip_weights(clip_data)
    weights["visual.proj"] = weights["visual.proj"].to(torch.int8)
    message = build_error(tmp_path, weights)
    assert "dtype: visual.proj" in message
    assert "int8" in message


# Shards
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda index: index["weight_map"].update({"a.bias": "model-00009-of-00009.safetensors"}), "not there"),
        (lambda index: index["weight_map"].update({"a.bias": "../outside.safetensors"}), "outside its directory"),
        (lambda index: index["weight_map"].update({"a.bias": "/etc/passwd"}), "outside its directory"),
        (lambda index: index["weight_map"].update({"a.bias": ".."}), "outside its directory"),
        (lambda index: index["weight_map"].update({"ghost": "weights.safetensors"}), "disagree"),
        (lambda index: index["weight_map"].pop("a.bias"), "disagree"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index["weight_map"].update({"a.bias": 3}), "no weight_map"),
    ],
)
def test_damaged_index_of_shards(
    tmp_path: Path, safetensors_file: Path, weights: Weights, change: Callable[[Any], Any], cause: str, refusal: Refusal
) -> None:
    save_file(weights, tmp_path.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(weights, safetensors_file.name)}
    change(index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cause in refusal(tmp_path)


def test_a_key_in_two_shards(tmp_path: Path, weights: Weights, refusal: Refusal) -> None:
    save_file(weights, tmp_path / "one.safetensors")
    save_file({"a.bias": weights["a.bias"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {**dict.fromkeys(weights, "one.safetensors"), "a.bias": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "disagree" in refusal(tmp_path)


# Names of code and of files in configs
def test_code_keys_are_not_followed(tmp_path: Path, weights: Weights) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config = {
        "model_type": "clip",
        "auto_map": {"AutoModel": "evil--evil.Model"},
        "_attn_implementation": "someone/kernel",
        "vision_config": {"attn_implementation": "someone/kernel", "hidden_size": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config == {"model_type": "clip", "vision_config": {"hidden_size": 8}}
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "templates", [[{"name": "../x", "template": "t"}], {"a/b": "t"}, [{"template": "t"}]], ids=["list", "dict", "none"]
)
def test_chat_template_names(tmp_path: Path, weights: Weights, templates: Any, refusal: Refusal) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert "chat template" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (b"[1]", "JSON text"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "nested"),
        (b'{"a": 1', "JSON"),
        (HTML, "HTML"),
        (b"", "empty"),
    ],
)
def test_malformed_config(tmp_path: Path, weights: Weights, config: bytes, cause: str, refusal: Refusal) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    assert cause in refusal(tmp_path)


def test_side_file_names_are_fixed(tmp_path: Path, weights: Weights) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit")
    checkpoint = open_checkpoint(str(tmp_path))
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
