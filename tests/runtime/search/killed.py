"""Embedding files, killed or interrupted at each file operation: a whole old or a whole new one, and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from vlm_export.bundle.staging import staged_file
from vlm_export.errors import UsageError
from vlm_export.interrupts import remembered_interrupts
from vlm_export.runtime.bulk.indexing import build_index, open_index
from vlm_export.runtime.search.store import EmbeddingsMeta, read_embeddings, write_embeddings

# The harness is a fixture of all tests, which the environment without torch does not have.
pytestmark = pytest.mark.needs_torch

META = EmbeddingsMeta(kind="text", model="tiny", identity="0" * 64)


def write(path: Path, generation: int, *, overwrite: bool = True) -> None:
    items = [f"{generation}-{row}" for row in range(generation)]
    write_embeddings(path, items, np.full((generation, 3), generation, np.float32), META, overwrite=overwrite)


def generation_of(path: Path) -> int:
    """The number that items and vectors carry; 0: no file."""
    if not path.exists():
        return 0
    found = read_embeddings(path)
    generation = len(found.items)
    assert found.items == tuple(f"{generation}-{row}" for row in range(generation))
    assert (found.vectors == generation).all()
    assert path.suffix != ".npy" or np.array_equal(np.load(path), found.vectors)
    return generation


@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "anew"])
@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
def test_killed_at_each_file_operation(harness: ModuleType, tmp_path: Path, name: str, exists: bool) -> None:
    path, seen = tmp_path / "out" / name, list[int]()
    path.parent.mkdir()
    if exists:
        write(path, 1)

    def repeat() -> None:
        try:
            write(path, 2, overwrite=exists)
        except UsageError:
            # The killed run had put its file in place.
            assert not exists
            assert seen[-1] == 2
            write(path, 2)

    killed = harness.kill_and_repeat_at_each_step(
        path.parent, lambda: write(path, 2, overwrite=exists), lambda: seen.append(generation_of(path)), repeat
    )
    assert killed >= 5
    assert set(seen[0::2]) == {int(exists), 2}
    assert set(seen[1::2]) == {2}


@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "anew"])
@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_an_index_killed_at_each_file_operation(
    harness: ModuleType, tmp_path: Path, method: Literal["exact", "approximate"], exists: bool
) -> None:
    path, seen = tmp_path / "out" / "e.index", list[int]()
    path.parent.mkdir()
    for rows in (90, 91):
        vectors = np.tile(np.eye(3, dtype=np.float32), (31, 1))[:rows]
        write_embeddings(tmp_path / f"{rows}.npy", [str(row) for row in range(rows)], vectors, META)

    def build(rows: int, *, overwrite: bool) -> None:
        build_index(tmp_path / f"{rows}.npy", path, method=method, overwrite=overwrite, threads=1)

    def check() -> None:
        if path.exists():
            index = open_index(path)
            index.verify()
            assert len(index.search(np.eye(3, dtype=np.float32)[0], 100)) == len(index)
        seen.append(len(open_index(path)) if path.exists() else 0)

    def repeat() -> None:
        # Also where the killed run had put its file in place.
        build(91, overwrite=True)

    if exists:
        build(90, overwrite=False)
    killed = harness.kill_and_repeat_at_each_step(path.parent, lambda: build(91, overwrite=exists), check, repeat)
    assert killed >= 5
    assert set(seen[0::2]) == {90 if exists else 0, 91}
    assert set(seen[1::2]) == {91}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupted_command_says_what_it_did(harness: ModuleType, tmp_path: Path, number: signal.Signals) -> None:
    path, seen = tmp_path / "e.npy", list[tuple[int, int]]()
    write(path, 1)

    def command() -> int:
        with remembered_interrupts():
            try:
                write(path, 2)
            except KeyboardInterrupt:
                return 130
            return 0

    def check(status: int) -> None:
        seen.append((status, generation_of(path)))
        write(path, 1)
        assert os.listdir(tmp_path) == ["e.npy"]

    assert harness.interrupt_at_each_step(command, check, number) >= 5
    assert set(seen) == {(130, 1), (0, 2)}


def test_what_is_being_written_is_not_swept(harness: ModuleType, tmp_path: Path) -> None:
    def hold(ready: Callable[[], None]) -> None:
        with staged_file(tmp_path / "mine.npy", "writing", overwrite=False) as staged:
            staged.write_bytes(b"half")
            ready()
            os.read(os.pipe()[0], 1)

    with harness.running(hold) as pid:
        write(tmp_path / "other.npy", 1)
        (staged,) = tmp_path.glob(f".mine.npy.vlm-export-{pid}-*.tmp")
        assert staged.read_bytes() == b"half"
    write(tmp_path / "other.npy", 2)
    assert os.listdir(tmp_path) == ["other.npy"]
