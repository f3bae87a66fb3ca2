"""Pickled state dicts: what torch.save writes is read as torch reads it, and nothing else costs more than its size."""

from __future__ import annotations

import argparse
import datetime
import pickle
import pickletools
import tracemalloc
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vlm_export.checkpoint.formats import pickle_data
from vlm_export.checkpoint.formats.pickle_data import MAX_OPCODES, MAX_PICKLE_BYTES
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError

Refusal = Callable[..., str]
Weights = dict[str, torch.Tensor]
ROOT = Path(__file__).parents[2]
FORMS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: Any, path: Path, legacy: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bytes: some dtypes have no comparison."""
    return tensor.detach().flatten().contiguous().view(torch.uint8)


def assert_as_torch_reads(path: Path, wrapper: str = "") -> None:
    loaded = torch.load(path, weights_only=True)
    expected = loaded[wrapper] if wrapper else loaded
    checkpoint = open_checkpoint(str(path))
    assert list(checkpoint.tensors) == list(expected)
    for key, tensor in expected.items():
        found = checkpoint.read(key)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert raw(found).equal(raw(tensor))


@FORMS
def test_views_and_parameters(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    weights = {
        "whole": base,
        "tied": base,
        "transposed": base.t(),
        "row": base[2],
        "every other": base[1:, ::2],
        "half": base.half().t(),
        "brain": base.bfloat16()[1:],
        "bool": base > 3,
        "complex": torch.view_as_complex(base.reshape(12, 2).clone()),
        "parameter": nn.Parameter(base + 1),
        "frozen": nn.Parameter(base.long(), requires_grad=False),
        "empty": torch.zeros(0, 3),
    }
    path = save(weights, tmp_path / "x.pt", legacy)
    assert_as_torch_reads(path)
    checkpoint = open_checkpoint(str(path))
    assert not any(checkpoint.read(key).requires_grad for key in weights)


def test_dtypes_without_a_storage_class(tmp_path: Path) -> None:
    weights = {"f8": torch.ones(3, 2).to(torch.float8_e4m3fn).t(), "u16": torch.arange(6).to(torch.uint16)[2:]}
    assert_as_torch_reads(save(weights, tmp_path / "x.pt", legacy=False))


@FORMS
def test_a_modules_own_state_dict(tmp_path: Path, legacy: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    assert module.state_dict()._metadata  # type: ignore[attr-defined]
    assert_as_torch_reads(save(module.state_dict(), tmp_path / "x.pt", legacy))


@FORMS
def test_what_trainers_store_beside_the_weights(tmp_path: Path, legacy: bool) -> None:
    module = nn.Linear(3, 2)
    # As AdamW's state_dict() gives it.
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "maximize": False, "foreach": None, "params": [0]}
    extra = {
        "optimizer": {"state": {0: moments}, "param_groups": [group]},
        "config": {"init_lr": 1e-5, "flags": (True, None), "names": ["a"], 7: -(1 << 40)},
        "epoch": 5,
        "milestones": Counter([3, 3]),
        "others": [{1, 2}, b"bytes", bytearray(b"x"), 1j, torch.float16, torch.Size([2]), torch.device("cpu")],
    }
    assert_as_torch_reads(save({"model": module.state_dict(), **extra}, tmp_path / "x.pt", legacy), "model")


def test_tensors_with_attributes(tmp_path: Path) -> None:
    tensor, parameter = torch.ones(2), nn.Parameter(torch.zeros(3))
    tensor.note = "x"  # type: ignore[attr-defined]
    parameter.note = "x"  # type: ignore[attr-defined]
    assert_as_torch_reads(save({"t": tensor, "p": parameter}, tmp_path / "x.pt", legacy=False))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex64).conj(),
        torch.zeros(2, dtype=torch.complex64).conj().imag,
        torch.zeros(2, device="meta"),
    ],
    ids=["conjugated", "negated", "meta"],
)
def test_tensors_whose_elements_are_not_stored(tmp_path: Path, tensor: torch.Tensor, refusal: Refusal) -> None:
    assert "tensor odd" in refusal(save({"odd": tensor}, tmp_path / "x.pt", legacy=False))


# Attacks
def pickled(path: Path, opcodes: bytes, legacy: bool = False) -> Path:
    """A file whose pickle is `opcodes`, in either format."""
    if legacy:
        save({}, path, legacy=True)
        head, _, rest = path.read_bytes().rpartition(b"\x80\x02}q\x00.")
        path.write_bytes(head + b"\x80\x02" + opcodes + b"." + rest)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr("archive/version", "3\n")
    return path


def nested_tuples(depth: int) -> bytes:
    """A tuple of twice the tuple before it: a hash of it takes 2**depth steps."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


@FORMS
def test_calls_that_double_their_argument(tmp_path: Path, legacy: bool, refusal: Refusal) -> None:
    def text(value: bytes) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value

    opcodes = b"c_codecs\nencode\n" * 20 + text(b"a" * 64)
    opcodes += b"".join(text(b"hex" if i else b"latin1") + b"\x86R" for i in range(20))
    path = pickled(tmp_path / "x.pt", opcodes, legacy)
    tracemalloc.start()
    try:
        assert "holds no state dict" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@FORMS
def test_keys_whose_hash_takes_forever(tmp_path: Path, legacy: bool, refusal: Refusal) -> None:
    # A hash of this key takes a quarter of a second; each level more doubles it.
    opcodes = b"}" + nested_tuples(24) + b"K\1s"
    assert "text or integers as keys" in refusal(pickled(tmp_path / "x.pt", opcodes, legacy))


@FORMS
def test_no_other_reader_of_pickles_is_asked(
    tmp_path: Path, weights: dict[str, torch.Tensor], legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(weights, tmp_path / "x.pt", legacy)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert set(open_checkpoint(str(path)).tensors) == set(weights)


def test_nested_tuples_in_other_places(tmp_path: Path, refusal: Refusal) -> None:
    tuples = nested_tuples(60)
    arguments = b"(" + tuples + b"K\0)))\x88t"
    for opcodes in (tuples + b"Q", b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"):
        refusal(pickled(tmp_path / "x.pt", b"}X\1\0\0\0w" + opcodes + b"s"))


def test_integer_keys_with_one_hash(tmp_path: Path, refusal: Refusal) -> None:
    keys = [i * (2**61 - 1) for i in range(1, 4)]
    assert len(set(map(hash, keys))) == 1
    opcodes = b"".join(b"\x8a\x09" + key.to_bytes(9, "little") + b"N" for key in keys)
    assert "text or integers" in refusal(pickled(tmp_path / "x.pt", b"}(" + opcodes + b"u"))


@FORMS
def test_pickles_of_many_opcodes(
    tmp_path: Path, legacy: bool, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_data, "MAX_OPCODES", 1000)
    assert "at most 1000 opcodes" in refusal(pickled(tmp_path / "x.pt", b"}" * 1001, legacy))


def test_pickles_of_many_bytes(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arch/data.pkl", b"}" * (MAX_PICKLE_BYTES + 1))
        archive.writestr("arch/constants.pkl", b"\x80\x02).")
    assert path.stat().st_size < 100_000
    assert f"at most {MAX_PICKLE_BYTES} bytes" in refusal(path)


def test_published_checkpoints_are_far_from_the_limits() -> None:
    """The archives of the oracle are in the published form; the largest published one has 1353 tensors."""
    largest = 1353
    archives = [*(ROOT / "tests" / "data").rglob("*.pt"), *(ROOT / "tests" / "data").rglob("*.pth")]
    assert archives
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            raw = archive.read(name)
        tensors = len(open_checkpoint(str(path)).tensors)
        assert 10 * largest * len(raw) / tensors < MAX_PICKLE_BYTES
        assert 10 * largest * sum(1 for _ in pickletools.genops(raw)) / tensors < MAX_OPCODES


def test_legacy_storages_beyond_the_file(tmp_path: Path, refusal: Refusal) -> None:
    path = save({"w": torch.ones(5)}, tmp_path / "x.pt", legacy=True)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"K\x05N", b"K\xffN"))
    assert "cut off" in refusal(path)
    path.write_bytes(raw.replace((5).to_bytes(8, "little"), (4).to_bytes(8, "little")))
    assert "stated size" in refusal(path)


@FORMS
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_ends_in_one_error_type(tmp_path: Path, legacy: bool, damage: list[tuple[float, int]]) -> None:
    path = save(
        {"model": {"a": torch.ones(3, 4), "b": torch.ones(4).half()}, "e": [1, 2.0, "x"]}, tmp_path / "x", legacy
    )
    raw = bytearray(path.read_bytes())
    for place, value in damage:
        raw[int(place * len(raw))] = value
    path.write_bytes(raw)
    with suppress(InputError):
        checkpoint = open_checkpoint(str(path))
        assert all(checkpoint.read(key).sum() is not None for key in checkpoint.tensors)


# What training scripts wrap around the weights
@FORMS
@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda w: {"state_dict": w, "epoch": 1}, None),
        (
            lambda w: {"model_state_dict": w, "loss": torch.tensor(0.3)},
            "the state dict under 'model_state_dict' was read",
        ),
        (lambda w: {"module": w, "ds_config": {}}, "the state dict under 'module' was read"),
        (lambda w: {"model": {"state_dict": w}, "step": 3}, None),
        (lambda w: {"clip": w, "optimizer": {"state": {}, "param_groups": []}}, "the state dict under 'clip' was read"),
        (
            lambda w: {"model_ema": {"x": torch.zeros(1)}, "model": w},
            "the state dict under 'model' was read; 'model_ema' beside it was not",
        ),
        (
            lambda w: {"net_ema": {"x": torch.zeros(1)}, "clip": w},
            "the state dict under 'clip' was read; 'net_ema' beside it was not",
        ),
        (lambda w: {"ema_state_dict": w}, "the state dict under 'ema_state_dict' was read"),
    ],
)
def test_wrappers(tmp_path: Path, weights: Weights, legacy: bool, wrap: Callable[[Any], Any], note: str | None) -> None:
    checkpoint = open_checkpoint(str(save(wrap(weights), tmp_path / "x.pt", legacy)))
    assert list(checkpoint.tensors) == list(weights)
    assert checkpoint.notes == (() if note is None else (note,))


def test_several_state_dicts_under_unusual_names(tmp_path: Path, weights: Weights, refusal: Refusal) -> None:
    message = refusal(save({"first": weights, "second": weights}, tmp_path / "x.pt", legacy=False))
    assert "several state dicts" in message
    assert "got: first, second" in message


@FORMS
def test_what_is_not_weights_stays_unread(tmp_path: Path, weights: Weights, legacy: bool) -> None:
    """Objects of any class beside the weights: no class is looked up, none of them is made."""
    args = argparse.Namespace(lr=1e-4, path=Path("x"), when=datetime.date(2026, 1, 1), best=np.float64(0.5))
    extra = {
        "args": args,
        "config": Opaque(3),
        "scores": np.arange(3),
        "queue": deque([1]),
        "table": defaultdict(int, a=1),
    }
    checkpoint = open_checkpoint(str(save({"model": weights, **extra}, tmp_path / "x.pt", legacy)))
    assert list(checkpoint.tensors) == list(weights)


@FORMS
def test_whole_modules_are_named(tmp_path: Path, legacy: bool, refusal: Refusal) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2), nn.GELU())
    for value in (module, {"model": module, "epoch": 3}):
        message = refusal(save(value, tmp_path / "x.pt", legacy))
        assert "a whole pickled object of the class torch.nn.modules.container.Sequential" in message
        assert "save model.state_dict()" in message


class Opaque:
    """Pickled by the name of this module."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("an object of the checkpoint was made")


@FORMS
def test_a_call_beside_weights_is_refused(
    tmp_path: Path, weights: Weights, sentinel: Any, legacy: bool, refusal: Refusal
) -> None:
    assert "mkdir" in refusal(save({"model": weights, "args": sentinel}, tmp_path / "x.pt", legacy))
