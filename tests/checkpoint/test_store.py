"""The scratch file: writable, zero-filled, deleted, and honest about a full disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import EnvironmentFailure

Usage = namedtuple("Usage", "total used free")


def test_tensors_are_separate_and_writable(tmp_path: Path) -> None:
    with ScratchStore(tmp_path / "scratch") as store:
        tensors = [store.new(shape) for shape in ((3, 5), (), (7,), (0, 2), (2, 2, 2))]
        assert all(tensor.dtype == torch.float32 and not tensor.any() for tensor in tensors)
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert [tuple(tensor.shape) for tensor in tensors] == [(3, 5), (), (7,), (0, 2), (2, 2, 2)]
        assert all((tensor == number).all() for number, tensor in enumerate(tensors))


def test_tensors_lie_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scratch"
    with ScratchStore(path) as store:
        store.new((3,))
        store.new((1000,)).fill_(2.5)
        stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
        assert (stored == 2.5).sum() == 1000
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_the_file_is_deleted_and_tensors_survive(tmp_path: Path) -> None:
    with ScratchStore(tmp_path / "scratch") as store:
        tensor = store.new((4,))
        tensor.fill_(1)
    assert not list(tmp_path.iterdir())
    assert tensor.sum() == 4


def test_the_file_is_deleted_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with ScratchStore(tmp_path / "scratch") as store:
            store.new((4,))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    with pytest.raises(EnvironmentFailure, match="cannot be created"):
        ScratchStore(path)
    assert path.read_text() == "mine"


def test_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    with ScratchStore(tmp_path / "scratch") as store, pytest.raises(EnvironmentFailure) as caught:
        store.new((1000,))
    assert (caught.value.expected, caught.value.got) == ("4000 bytes free", "100 bytes free")


def test_full_disk_is_noticed_while_reserving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ScratchStore(tmp_path / "scratch") as store:
        kept = store.new((10,))
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(EnvironmentFailure, match="cannot write"):
            store.new((1000,))
        monkeypatch.undo()
        store.new((10,)).fill_(1)
        assert kept.sum() == 0


def test_without_fallocate_zeros_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "scratch"
    with ScratchStore(path) as store:
        store.new((600_000,)).fill_(1)
        store.new((3,))
        assert path.stat().st_size == 600_000 * 4 + 3 * 4


def test_file_size_limit_is_an_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ScratchStore(tmp_path / "scratch") as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(EnvironmentFailure):
                store.new((1000,))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
