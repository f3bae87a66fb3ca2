"""Killed and competing exports: the bundle is the old or the new one, whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vlm_export.bundle import publish, replacement
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.publish import publication
from vlm_export.bundle.target_lock import lock_path, locked
from vlm_export.errors import EnvironmentFailure, InputError
from vlm_export.interrupts import raise_remembered, remembered_interrupts

_STEPS_BEFORE_REPLACEMENT = 20
Publish = Callable[..., Manifest]
Read = Callable[[Path], int]


def hidden(parent: Path) -> list[str]:
    return sorted(entry.name for entry in parent.iterdir() if entry.name.startswith("."))


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; only a lost machine does, and syncing is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(replacement, "exchange", lambda new, old: False)
    return str(request.param)


def test_killed_at_each_file_operation(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, harness: ModuleType, way: str, no_sync: None
) -> None:
    """The next export makes a whole bundle of what is left, and clears the rest."""
    target = tmp_path / "out" / "bundle"
    publish_generation(target, 1)
    seen: list[int] = []

    def export() -> None:
        publish_generation(target, 2)

    killed = harness.kill_and_repeat_at_each_step(
        target.parent, export, lambda: seen.append(read_generation(target)), export
    )
    assert killed > 20
    # Of each child: what the kill left, and what the next run made of it.
    assert seen[1::2] == [2] * (killed + 1)
    assert seen[0::2] == sorted(seen[0::2])
    assert seen[0] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("default_interrupts")
def test_interrupted_at_each_file_operation(
    read_generation: Read,
    tmp_path: Path,
    publish_generation: Publish,
    harness: ModuleType,
    way: str,
    no_sync: None,
    number: signal.Signals,
) -> None:
    """The exit status is true: 130 and the old bundle, or 0 and the new one, also while the old one is deleted."""
    target, seen = tmp_path / "out" / "bundle", list[tuple[int, int]]()
    publish_generation(target, 1)

    def command() -> int:
        with remembered_interrupts():
            try:
                publish_generation(target, 2)
                # What a command does after publication.
                raise_remembered()
            except KeyboardInterrupt:
                return 130
            return 0

    def check(status: int) -> None:
        seen.append((status, read_generation(target)))
        if status == 0:
            assert hidden(target.parent) == []
        publish_generation(target, 1)
        assert hidden(target.parent) == []

    assert harness.interrupt_at_each_step(command, check, number) > 20
    assert set(seen) == {(130, 1), (0, 2)}


def test_naive_overwriting_would_be_caught(
    read_generation: Read,
    tmp_path: Path,
    publish_generation: Publish,
    harness: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    no_sync: None,
) -> None:
    """The control: a writer that writes file by file does not pass the tests above."""
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    monkeypatch.setattr(publish, "replace_directory", lambda new, old: shutil.copytree(new, old, dirs_exist_ok=True))
    with pytest.raises(InputError, match="not the one that was exported"):
        harness.kill_at_each_step(
            lambda: publish_generation(target, 2), lambda: read_generation(target), first=_STEPS_BEFORE_REPLACEMENT
        )


def test_first_export_killed_at_each_file_operation(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, harness: ModuleType, no_sync: None
) -> None:
    target = tmp_path / "bundle"

    def check() -> None:
        if target.exists():
            assert read_generation(target) == 1
            shutil.rmtree(target)

    assert harness.kill_at_each_step(lambda: publish_generation(target, 1), check) > 20
    publish_generation(target, 2)
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_second_export_to_one_target_is_refused(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, harness: ModuleType
) -> None:
    target = tmp_path / "bundle"
    publish_generation(target, 1)

    def hold(ready: Callable[[], None]) -> None:
        with publication(target, overwrite=True) as staging:
            staging.file("half").write_bytes(b"half")
            ready()
            os.read(os.pipe()[0], 1)

    with harness.running(hold) as pid:
        with pytest.raises(EnvironmentFailure, match=f"held by process {pid}"):
            publish_generation(target, 2)
        assert read_generation(target) == 1
        publish_generation(tmp_path / "neighbour", 3)
        # The live export's directory is not swept by its neighbour.
        assert len([name for name in hidden(tmp_path) if name.startswith(f".bundle.vlm-export-{pid}-")]) == 1
    publish_generation(target, 2)
    assert read_generation(target) == 2
    assert hidden(tmp_path) == []


def test_concurrent_exports_end_with_one_whole_bundle(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, harness: ModuleType
) -> None:
    target = tmp_path / "bundle"

    def loop(first: int) -> None:
        for generation in range(first, first + 10):
            try:
                publish_generation(target, generation)
            except EnvironmentFailure as error:
                if "another process" not in error.what:
                    raise

    pids = [harness.forked(lambda first=first: loop(first)) for first in (0, 100, 200)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    read_generation(target)
    assert os.listdir(tmp_path) == ["bundle"]


def test_leftovers_of_a_dead_export_are_swept(tmp_path: Path, publish_generation: Publish) -> None:
    """Also those of another target in the same directory; what only looks alike is left."""
    dead = [tmp_path / f".{name}.vlm-export-4194304-0123456789ab.tmp" for name in ("bundle", "other")]
    for directory in dead:
        (directory / "onnx").mkdir(parents=True)
        (directory / "onnx" / "half").write_bytes(b"x")
    alike = tmp_path / ".bundle.vlm-export-notes.tmp"
    alike.mkdir()
    link = tmp_path / ".bundle.vlm-export-1-0123456789ab.tmp"
    link.symlink_to(alike)
    lock_path(tmp_path / "bundle").write_text("4194304")
    publish_generation(tmp_path / "bundle", 1)
    assert sorted(os.listdir(tmp_path)) == sorted([alike.name, link.name, "bundle"])


def test_the_lock_is_released_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for _ in range(2):
        with locked(target):
            assert lock_path(target).read_text() == str(os.getpid())
            with pytest.raises(EnvironmentFailure, match=f"process {os.getpid()}"), locked(target):
                raise AssertionError("not reached")
        assert os.listdir(tmp_path) == []


def test_a_bundle_moved_aside_comes_back(read_generation: Read, tmp_path: Path, publish_generation: Publish) -> None:
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    target.rename(replacement.aside_path(target))
    assert read_generation(target) == 1
    target.rename(replacement.aside_path(target))
    target.mkdir()
    publish_generation(target, 2, overwrite=True)
    assert read_generation(target) == 2
    assert os.listdir(tmp_path) == ["bundle"]


def test_exchange_needs_no_second_step_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if replacement.exchange(tmp_path / "a", tmp_path / "b"):
        assert os.listdir(tmp_path / "a") == ["b"]
        assert os.listdir(tmp_path / "b") == ["a"]
    else:
        assert os.listdir(tmp_path / "a") == ["a"]
